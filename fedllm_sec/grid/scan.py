"""`fedllm-sec scan`: whether a saved adapter looks backdoored, against a bank of adapters of its base."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm_sec.errors import FedError, Parser, quietly, reason

EPILOG = """\
The shipped bank is of the embedded model. An adapter of another base, rank or choice of layers is refused: make a bank
of such adapters from a recipe, whose clients train them. No code of the adapter is run, no pickle read.
Exit status: 0 not flagged, 1 flagged, 2 no verdict.

examples:
  fedllm-sec scan runs/mine/adapter
  fedllm-sec scan --calibrate smoke/scan --seeds 30 --out bank.json && fedllm-sec scan adapter --bank bank.json
"""


SEEDS, RATE = 30, 0.05  # of a calibration, unless said otherwise


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser(
        prog="fedllm-sec scan",
        description="How likely a saved peft adapter is to be backdoored, by the spectra of its weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", nargs="?", type=Path, metavar="ADAPTER", help="a folder with its safetensors")
    parser.add_argument("--bank", type=Path, help="a file that --calibrate has made (without: the shipped one)")
    parser.add_argument("--base", help="where the base model lies, if not where the adapter says")
    parser.add_argument("--calibrate", type=Path, metavar="RECIPE", help="train adapters and make a bank of them")
    parser.add_argument("--set", action="append", metavar="key.sub=value", help="an override of RECIPE")
    parser.add_argument("--seeds", type=int, help="how many seeds a bank is made of, from 0 (30)")
    parser.add_argument("--rate", type=float, help="of the clean ones that may be flagged (0.05)")
    parser.add_argument("--out", type=Path, help="the file that --calibrate makes; it must not exist")
    given = parser.parse_args(argv)
    if (given.calibrate is None) == (given.adapter is None):
        parser.error("give an ADAPTER to judge, or --calibrate RECIPE to make a bank; one of them.")
    others = ("bank", "base") if given.adapter is None else ("set", "seeds", "rate", "out")
    if idle := [f"--{name}" for name in others if getattr(given, name) is not None]:
        what = "an ADAPTER that is judged" if given.adapter is None else "--calibrate RECIPE"
        parser.error(f"{', '.join(idle)}: acts beside {what} alone. Leave it out.")
    try:
        if given.calibrate is None:
            return _judge(given)
        if given.out is None or given.out.exists():
            parser.error(f"--out {given.out}: names no new file. Say where the bank is to be written.")
        given.seeds = SEEDS if given.seeds is None else given.seeds
        given.rate = RATE if given.rate is None else given.rate
        if given.seeds < 5 or not 0 <= given.rate < 1:
            parser.error(f"--seeds {given.seeds}, --rate {given.rate}: must be 5 or more, and in [0, 1).")
        return _calibrate(given)
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _judge(given: argparse.Namespace) -> int:
    from fedllm_sec.api.scan import SHIPPED, Bank, in_words, scan

    bank = Bank.read(given.bank or SHIPPED)
    verdict = scan(given.adapter, bank, given.base)
    print("\n".join(in_words(str(given.adapter), verdict, bank)))
    return int(verdict.flagged)


def _calibrate(given: argparse.Namespace) -> int:
    from fedllm_sec.grid.bank import calibrated
    from fedllm_sec.recipe import shipped
    from fedllm_sec.records.files import write_json
    from fedllm_sec.train import quiet

    quiet()
    bank = calibrated(shipped.find(given.calibrate), given.set or [], range(given.seeds), given.rate)
    try:
        write_json(given.out, bank.as_dict())
    except OSError as error:
        raise FedError(f"--out {given.out}: cannot be written ({reason(error)}). Name another file.") from error
    print(
        f"written: {given.out}: {bank.clean} clean and {bank.backdoored} backdoored adapters of {bank.base}; judged by "
        f"models that had not seen them, {bank.false_positives} clean and {bank.found} backdoored ones were flagged"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
