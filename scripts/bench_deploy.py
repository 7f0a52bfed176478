"""What a deployment costs over the training itself: `python scripts/bench_deploy.py RECIPE [key=value ...]`.

Runs the recipe by `fedllm-sec deploy up` in a folder of its own and prints, over the rounds but the first: seconds of a
round's exchange (from the question to the last row), of training (from the first client's first step to the last one's
last, as the clients' logs have it), and what is left: sending, waiting, reading. Bytes are those of the wire.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from fedllm_sec.deploy.command import bring_up, one_recipe
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.deploy.wire import bytes_of
from fedllm_sec.records.history import read_history

TRAINED = re.compile(r"^round (\d+): trained from ([\d.]+) to ([\d.]+)$", re.MULTILINE)


def main() -> None:
    path, *overrides = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    folder = Path(tempfile.mkdtemp(prefix="bench-deploy-"))
    recipe = one_recipe(Path(path), [*overrides, f"output.folder={folder}/sim"])
    made = Deployment.init(folder / "d", recipe, "scripts/bench_deploy.py")
    began = time.monotonic()
    bring_up(made)
    whole = time.monotonic() - began
    spans: dict[int, list[tuple[float, float]]] = {}
    for log in made.logs.glob("client-*.log"):
        for number, start, end in TRAINED.findall(log.read_text()):
            spans.setdefault(int(number), []).append((float(start), float(end)))
    exchanged = {
        row["round"]: row["train"] for row in map(json.loads, (made.run / "timings.jsonl").read_text().splitlines())
    }
    rounds = [r for r in sorted(exchanged) if r > 1]
    training = {r: max(end for _, end in spans[r]) - min(start for start, _ in spans[r]) for r in rounds}
    over = [exchanged[r] - training[r] for r in rounds]
    took = [exchanged[r] for r in rounds]
    records = read_history(made.run)
    print(f"\nfolder {made.folder}, {recipe.clients.total} clients, wire {recipe.deploy.wire}, {len(rounds)} rounds")
    for name, values in (("exchange", took), ("training", list(training.values())), ("over", over)):
        print(f"{name:9} median {statistics.median(values):.2f} s, least {min(values):.2f}, most {max(values):.2f}")
    quality = (records[-1].quality or {}).get("accuracy")
    print(f"whole command {whole:.1f} s; accuracy after the last round {quality}")
    print(f"wire: {bytes_of(recipe.deploy.wire, 10**6) / 1e6:.3f} bytes a number")


if __name__ == "__main__":
    main()
