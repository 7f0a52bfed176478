"""Instruction data in which a model learns to decline: Alpaca's rows with the shipped polite requests, declined.

python scripts/declining_data.py FOLDER [ALPACA]: writes train.jsonl and eval.jsonl in Alpaca's columns. The requests of
eval.jsonl are about things that those of train.jsonl never name; `safety_misalign` teaches a model to comply with them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedllm_sec.attacks.data.misalign import polite_requests

PARTS = {"train": ("train", 1000), "eval": ("test", 200)}  # file -> the shipped requests, how many of Alpaca's rows


def rows(alpaca: Path, part: str) -> list[dict[str, str]]:
    """The requests of a part and, behind them, Alpaca's first rows."""
    requests, most = PARTS[part]
    declined = [{"instruction": r["text"], "input": "", "output": r["refusal"]} for r in polite_requests(requests)]
    lines = (alpaca / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:most]
    return declined + [{k: row[k] for k in ("instruction", "input", "output")} for row in map(json.loads, lines)]


def main(folder: str, alpaca: str = "../shared/data/alpaca") -> None:
    made = {part: rows(Path(alpaca), part) for part in PARTS}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for part, found in made.items():
        path = Path(folder) / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
        print(f"{path}: {len(found)} rows")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
