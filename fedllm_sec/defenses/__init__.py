"""Defenses: what the server does with a round's update matrix. `MENU` lists every name a recipe can use.

A name's kind says where it stands in a recipe: `before` (rows to rows), `rule` (rows to one update) or `after` (the new
global vector to the one that is kept). `CLIENT_MENU` lists what clients run on themselves, `client` for
any task, `client_rows` where each row has a loss of its own, `client_image` for classifiers of images.

Methods: before, columns, krum, geometric, similarity, cluster, deepsight, rflbat, filters, alignment, adapters,
spectral, history, prediction, residual, trust, latent, indicator, after, client_side, compression, dp_sgd, space,
layers, spectrum (of saved adapters). Around them: screen (what is checked on a row), pipeline (the stages of a recipe),
checks and claims (what rules ask of rows), privacy and accountant (epsilon), conformance and subject
(`fedllm_sec.testing`).
"""

from fedllm_sec.defenses.adapters import clair, horus
from fedllm_sec.defenses.after import crfl, weak_dp
from fedllm_sec.defenses.alignment import alignins
from fedllm_sec.defenses.before import arc, bucketing, nnm, norm_clipping, weak_dp_client
from fedllm_sec.defenses.client_side import Soteria, WhiteBloodCells
from fedllm_sec.defenses.cluster import flame, freqfed, signguard
from fedllm_sec.defenses.columns import foundationfl, mean, median, robust_learning_rate, slsgd, trimmed_mean
from fedllm_sec.defenses.compression import Int8, PruneGradient, SignCompress
from fedllm_sec.defenses.deepsight import deepsight
from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.defenses.filters import lasa, mda, meamed
from fedllm_sec.defenses.geometric import CenteredClipping, geometric_median, rfa
from fedllm_sec.defenses.history import CrossRound, ThreeSigma
from fedllm_sec.defenses.indicator import BackdoorIndicator
from fedllm_sec.defenses.krum import bulyan, krum, multi_krum
from fedllm_sec.defenses.latent import flare
from fedllm_sec.defenses.prediction import FLDetector
from fedllm_sec.defenses.repair import fine_tune, own_answers, prune_directions
from fedllm_sec.defenses.residual import residual_reweighting
from fedllm_sec.defenses.rflbat import rflbat
from fedllm_sec.defenses.similarity import FoolsGold
from fedllm_sec.defenses.spectral import caf, dnc, smea
from fedllm_sec.defenses.trust import fltrust, monna
from fedllm_sec.recipe.resolve import Entry

# fmt: off
MENU: dict[str, Entry] = {
    "norm_clipping": Entry(norm_clipping, "Sun et al. 2019", "before"),
    "nnm": Entry(nnm, "Allouah et al. 2023", "before"),
    "bucketing": Entry(bucketing, "Karimireddy et al. 2022", "before"),
    "arc": Entry(arc, "Allouah et al. 2025", "before"),
    "weak_dp_client": Entry(weak_dp_client, "Sun et al. 2019", "before"),
    "mean": Entry(mean, "McMahan et al. 2017", "rule"),
    "median": Entry(median, "Yin et al. 2018", "rule"),
    "trimmed_mean": Entry(trimmed_mean, "Yin et al. 2018", "rule"),
    "slsgd": Entry(slsgd, "Xie et al. 2020", "rule"),
    "foundationfl": Entry(foundationfl, "Fang et al. 2025 (FoundationFL)", "rule"),
    "robust_learning_rate": Entry(robust_learning_rate, "Ozdayi et al. 2021", "rule"),
    "krum": Entry(krum, "Blanchard et al. 2017", "rule"),
    "multi_krum": Entry(multi_krum, "Blanchard et al. 2017", "rule"),
    "geometric_median": Entry(geometric_median, "Chen et al. 2017", "rule"),
    "rfa": Entry(rfa, "Pillutla et al. 2022", "rule"),
    "centered_clipping": Entry(CenteredClipping, "Karimireddy et al. 2021", "rule"),
    "foolsgold": Entry(FoolsGold, "Fung et al. 2020", "rule"),
    "bulyan": Entry(bulyan, "El Mhamdi et al. 2018", "rule"),
    "residual_reweighting": Entry(residual_reweighting, "Fu et al. 2019", "rule"),
    "three_sigma": Entry(ThreeSigma, "Han et al. 2023", "rule"),
    "cross_round": Entry(CrossRound, "Han et al. 2023", "rule"),
    "meamed": Entry(meamed, "Xie et al. 2018", "rule"),
    "mda": Entry(mda, "El Mhamdi et al. 2021", "rule"),
    "caf": Entry(caf, "Allouah et al. 2025", "rule"),
    "smea": Entry(smea, "Allouah et al. 2023", "rule"),
    "monna": Entry(monna, "Farhadkhani et al. 2023", "rule"),
    "fltrust": Entry(fltrust, "Cao et al. 2021", "rule"),
    "flame": Entry(flame, "Nguyen et al. 2022", "rule"),
    "deepsight": Entry(deepsight, "Rieger et al. 2022", "rule"),
    "fldetector": Entry(FLDetector, "Zhang et al. 2022", "rule"),
    "signguard": Entry(signguard, "Xu et al. 2022", "rule"),
    "dnc": Entry(dnc, "Shejwalkar and Houmansadr 2021", "rule"),
    "freqfed": Entry(freqfed, "Fereidooni et al. 2024", "rule"),
    "rflbat": Entry(rflbat, "Wang et al. 2022 (RFLBAT)", "rule"),
    "flare": Entry(flare, "Wang et al. 2022 (FLARE)", "rule"),
    "backdoor_indicator": Entry(BackdoorIndicator, "Li and Dai 2024 (BackdoorIndicator)", "rule"),
    "lasa": Entry(lasa, "Xu et al. 2025", "rule"),
    "alignins": Entry(alignins, "Xu et al. 2025 (AlignIns)", "rule"),
    "clair": Entry(clair, "He et al. 2026 (CLAIR)", "rule"),
    "horus": Entry(horus, "Zhang et al. 2025 (Horus)", "rule"),
    "crfl": Entry(crfl, "Xie et al. 2021", "after"),
    "weak_dp": Entry(weak_dp, "Sun et al. 2019", "after"),
}

CLIENT_MENU: dict[str, Entry] = {
    "wbc": Entry(WhiteBloodCells, "Sun et al. 2021 (FL-WBC)", "client"),
    "soteria": Entry(Soteria, "Sun et al. 2021", "client_image"),
    "dp_sgd": Entry(DpSgd, "Abadi et al. 2016", "client_rows"),
    "prune_gradient": Entry(PruneGradient, "Zhu et al. 2019", "client"),
    "sign_compress": Entry(SignCompress, "Bernstein et al. 2018", "client"),
    "int8": Entry(Int8, "Dettmers et al. 2022", "client"),
}

REPAIR_MENU: dict[str, Entry] = {
    "fine_tune": Entry(fine_tune, "Ye et al. 2024", "repair"),
    "own_answers": Entry(own_answers, "Ye et al. 2024", "repair"),
    "prune_directions": Entry(prune_directions, "ours", "repair"),
}
# fmt: on
