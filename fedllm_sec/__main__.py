"""The command `fedllm-sec`: each subcommand but verify is the same as its `python -m fedllm_sec.NAME`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fedllm_sec import __version__
from fedllm_sec.errors import quietly

COMMANDS = {
    "train": ("fedllm_sec.train", "run a recipe"),
    "benchmark": ("fedllm_sec.benchmark", "run a grid of attacks and defenses"),
    "deploy": ("fedllm_sec.deploy.command", "run a recipe on real clients, over Flower"),
    "report": ("fedllm_sec.report.__main__", "make tables and a page of finished runs"),
    "aggregate": ("fedllm_sec.api.folders", "make one adapter of several, by a rule"),
    "scan": ("fedllm_sec.grid.scan", "say whether a saved adapter looks backdoored"),
    "audit": ("fedllm_sec.build.audit", "show what an observer learnt from a run"),
    "verify": ("fedllm_sec.records.verify", "check that run folders are as their runs left them"),
    "menu": ("fedllm_sec.menu", "list what a recipe can name"),
    "recipe": ("fedllm_sec.recipe.__main__", "list, show and translate recipes"),
}
USAGE = "usage: fedllm-sec [--version] command ...\n\n" + "\n".join(
    f"  {name:<11}{what}" for name, (_, what) in COMMANDS.items()
)


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the subcommand; 2 where there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["-V"]):
        print(f"fedllm-sec {__version__}")
        return 0
    if words and words[0] in COMMANDS:
        code: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
        return code
    if words and words[0] not in ("-h", "--help"):
        from fedllm_sec.recipe.resolve import did_you_mean

        print(f'error: there is no command "{words[0]}".{did_you_mean(words[0], COMMANDS)}\n\n{USAGE}', file=sys.stderr)
        return 2
    print(f"{USAGE}\n\nEach has its own --help, and all but verify are the same as `python -m fedllm_sec.COMMAND`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
