"""`fedllm-sec audit RUN`: what an observer of a run learns from what clients sent, and the page that shows it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.errors import FedError, Parser, RecipeError, quietly
from fedllm_sec.records import inventory, observed
from fedllm_sec.records.folder import read_recipe

EPILOG = """\
RUN is the folder of a run whose recipe has attack.privacy and attack.observe. The run itself has attacked what was
kept when it ended, and this reads the scores; --again attacks anew, which takes as long as `train --explain` says.

examples:
  fedllm-sec train privacy/quickstart && fedllm-sec audit runs/privacy_quickstart
"""


def audit(run_folder: str | Path, again: bool = False) -> dict[str, Any]:
    """What was learnt from a run: the content of its privacy.json, {"what", "attacks": [...]}; writes RUN/audit.html.

    Attacks that have not been made yet, or all of them with `again`, are made on the rows that were kept. An error
    where the run's recipe names no observer, or code from outside the package.
    """
    from fedllm_sec.report.privacy import write_audit

    if not isinstance(run_folder, (str, Path)):
        raise RecipeError(f"audit: {run_folder!r}: must be the path of a run's folder.")
    folder = Path(run_folder)
    found = None if again else observed.read_found(folder)
    if found is None:
        found = _attacked(folder, again)
    write_audit(folder)
    return found


def _attacked(folder: Path, again: bool) -> dict[str, Any]:
    from accelerate import Accelerator

    from fedllm_sec.build.federation import assemble
    from fedllm_sec.build.names import checked, outside
    from fedllm_sec.build.observing import audited, leakage
    from fedllm_sec.build.plan import planned
    from fedllm_sec.rounds.compute import Machine

    if not (folder / "recipe.yaml").is_file():
        raise FedError(f"{folder}: holds no run (no recipe.yaml). Give the folder that a run printed.")
    raw = dict(read_recipe(folder / "recipe.yaml"))
    if code := [name for _, name in outside(raw)]:
        raise RecipeError(
            f"{folder}: its recipe names code, which would be run: {', '.join(code)}. Run its train command, which "
            "audits as it ends."
        )
    recipe = checked({**raw, "variants": None})
    if not recipe.enable_attack or recipe.attack is None or recipe.attack.observe is None:
        raise RecipeError(
            f"{folder}: nobody observed this run. Add attack.privacy and attack.observe, and run it (--fresh)."
        )
    recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"folder": str(folder)})})
    federation = assemble(planned(recipe), Machine(Accelerator(), recipe.compute.placement))
    made = audited(recipe, federation, folder, print, again)
    assert made is not None
    inventory.renewed(folder, observed.FOUND, **leakage(made))
    return made


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="fedllm-sec audit",
        description="What an observer of a run learns from what clients sent.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--again", action="store_true", help="attack anew what was kept")
    options: Any = parser.parse_args(argv)
    folder = Path(os.path.expanduser(options.run))
    try:
        found = audit(folder, options.again)
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from fedllm_sec.report.privacy import as_text

    print(as_text(found))
    print(f"page: {folder / 'audit.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
