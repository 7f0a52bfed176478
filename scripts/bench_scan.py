"""How well `spectral_scan` tells backdoored adapters of the embedded model, and an attacker who matches clean spectra.

    OMP_NUM_THREADS=1 python scripts/bench_scan.py --folder runs/scan_bench

Trains the adapters of recipes/smoke/scan.yaml (6 to 7 s of one core for the two of a seed; those that are in the folder
are read): seeds 0 to 29 for the bank, 1000 to 1099 to be judged, and the clean ones of 2000 to 2007, which are the
attacker's own. He gives every layer of a backdoored adapter the singular values of one of these and keeps its singular
vectors. Prints the AUC of both with the middle 95 % of 2,000 bootstrap draws of seeds, and what became of the backdoor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedllm_sec.api.scan import Bank, weights_hash
from fedllm_sec.defenses.spectrum import spectral_features
from fedllm_sec.grid.bank import as_saved, federations, of_features, pairs_of, scales_of, trained
from fedllm_sec.matrix import Layout
from fedllm_sec.models.products import singular_values, with_spectrum
from fedllm_sec.records.files import write_json
from fedllm_sec.rounds.federation import Federation, evaluate
from fedllm_sec.train import quiet

RECIPE = Path("recipes/smoke/scan.yaml")
BANK, HELD, OWN = range(30), range(1000, 1100), range(2000, 2008)


def measured(fed: Federation, vector: Tensor) -> dict[str, float]:
    """Held-out loss, attack success and false triggers of an adapter."""
    start, fed.vector = fed.vector, vector
    quality, attack, _ = evaluate(fed, last=True)
    fed.vector = start
    assert attack is not None
    return {"loss": quality["loss"], "asr": attack["asr"]["value"], "false": attack["false_trigger"]["value"]}


def place(folder: Path, seed: int, bad: bool) -> Path:
    return folder / f"{seed}_{'backdoored' if bad else 'clean'}.safetensors"


def made_in(folder: Path, seeds: Sequence[int], measure: bool) -> None:
    """The adapters of these seeds, one file each, where they are not there yet."""
    missing = [s for s in seeds if not (place(folder, s, False).exists() and place(folder, s, True).exists())]
    for made in trained(RECIPE, [], missing):
        found: dict[str, Any] = {"variant": made.variant}
        if measure and made.backdoored:
            found |= measured(made.federation, made.vector)
        save_file({"vector": made.vector}, place(folder, made.seed, made.backdoored), {"found": json.dumps(found)})


def read(path: Path) -> tuple[Tensor, dict[str, Any]]:
    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor("vector"), json.loads(opened.metadata()["found"])


def bootstrap(clean: np.ndarray, bad: np.ndarray) -> tuple[float, float, float]:
    """AUC of the scores of (n,) clean and (n,) backdoored adapters by seed, and the middle 95 % over draws of seeds."""
    rng, truth = np.random.default_rng(0), np.repeat([0, 1], len(clean))

    def auc(at: np.ndarray) -> float:
        return float(roc_auc_score(truth, np.concatenate([clean[at], bad[at]])))

    drawn = [auc(rng.integers(len(clean), size=len(clean))) for _ in range(2000)]
    return auc(np.arange(len(clean))), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def told(name: str, clean: np.ndarray, bad: np.ndarray, bank: Bank) -> None:
    auc, low, high = bootstrap(clean, bad)
    print(
        f"{name}: AUC {auc:.3f} ({low:.3f} to {high:.3f}); flagged {int((bad > bank.threshold).sum())} of {len(bad)} "
        f"backdoored, {int((clean > bank.threshold).sum())} of {len(clean)} clean"
    )


def matched(vector: Tensor, clean: Tensor, layout: Layout, scales: Sequence[float]) -> Tensor:
    """A backdoored adapter whose layers have the singular values of a clean one."""
    changed = vector.clone()
    for (a, b), scale, (clean_a, clean_b) in zip(
        pairs_of(changed, layout), scales, pairs_of(clean, layout), strict=True
    ):
        new_a, new_b = with_spectrum(a, b, singular_values(clean_a, clean_b, scale), scale)
        a.copy_(new_a)  # a view of `changed`, as b is
        b.copy_(new_b)
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scan_bench"))
    parser.add_argument("--bank", type=Path, help="write the bank to this file too")
    parser.add_argument("--measure", type=int, default=len(HELD), help="how many evading adapters to run (all)")
    args = parser.parse_args()
    quiet()
    args.folder.mkdir(parents=True, exist_ok=True)
    for seeds, measure in ((BANK, False), (HELD, True), (OWN, False)):
        made_in(args.folder, seeds, measure)
    example = next(trained(RECIPE, [], [0])).federation
    layout, scales = example.task.layout, scales_of(example.task)

    def features(seeds: Sequence[int], bad: bool) -> np.ndarray:
        vectors = [read(place(args.folder, seed, bad))[0] for seed in seeds]
        return np.stack([spectral_features(pairs_of(vector, layout), scales) for vector in vectors])

    both = np.concatenate([features(BANK, False), features(BANK, True)])
    bank = of_features(
        both, np.repeat([False, True], len(BANK)), np.tile(BANK, 2), rate=0.05, base="tiny",
        sha256=weights_hash("tiny"), shapes=as_saved(layout),
        made_of=f"{RECIPE.name}, seeds {BANK[0]} to {BANK[-1]}",
    )  # fmt: skip
    if args.bank is not None:
        write_json(args.bank, bank.as_dict())
    clean, bad = (bank.scanner.probability(features(HELD, kind)) for kind in (False, True))
    told("plain", clean, bad, bank)
    before = [read(place(args.folder, seed, True))[1] for seed in HELD]
    own = [read(place(args.folder, seed, False))[0] for seed in OWN]
    held = {seed: read(place(args.folder, seed, True))[0] for seed in HELD}
    evaded = {
        seed: matched(vector, own[number % len(own)], layout, scales)
        for number, (seed, vector) in enumerate(held.items())
    }
    found = np.stack([spectral_features(pairs_of(vector, layout), scales) for vector in evaded.values()])
    told("spectra matched", clean, bank.scanner.probability(found), bank)
    after = [measured(fed, evaded[seed]) for seed, _, fed in federations(RECIPE, [], HELD[: args.measure])]
    kinds = [found["variant"] for found in before[: args.measure]]
    for kind in [*sorted(set(kinds)), "all"]:
        at = [i for i, other in enumerate(kinds) if kind in (other, "all")]
        means = [
            " ".join(f"{key} {np.mean([found[i][key] for i in at]):.3f}" for key in ("asr", "false", "loss"))
            for found in (before, after)
        ]
        print(f"{kind} ({len(at)}): {means[0]} -> {means[1]}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
