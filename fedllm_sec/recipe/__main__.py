"""What can be done with recipes: `python -m fedllm_sec.recipe list | show NAME | from-fedml config.yaml`."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fedllm_sec.errors import FedError, Parser, quietly, reason
from fedllm_sec.recipe import shipped


def home(text: str) -> Path:
    """A path as it is typed: `~` is the home folder, also where no shell has put it in."""
    return Path(os.path.expanduser(text))


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: translated, but something asked for has no equivalent; 2: it cannot be read or written."""
    parser = Parser(prog="python -m fedllm_sec.recipe", description="What can be done with recipes.")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    commands.add_parser("list", help="name the recipes that come with the package")
    show = commands.add_parser("show", help="print one of them, to be changed and run as your own")
    show.add_argument("name", help="as in the list, e.g. quickstart")
    fedml = commands.add_parser(
        "from-fedml",
        help="turn a FedML security YAML into a recipe",
        description="Prints the recipe, and to the error output what became of each key. Exits with 1 if something "
        "asked for has no equivalent.",
    )
    fedml.add_argument("config", type=home, help="FedML's YAML, with train_args, attack_args, defense_args, ...")
    fedml.add_argument("--out", type=home, metavar="RECIPE", help="write the recipe to this new file instead")
    options = parser.parse_args(argv)
    try:
        if options.command == "list":
            print("\n".join(f"{name:<32}{title(name)}" for name in shipped.names()))
        elif options.command == "show":
            print(shipped.file_of(options.name).read_text(encoding="utf-8"), end="")
        else:
            from fedllm_sec.fedml.command import from_fedml

            return from_fedml(options.config, options.out)
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise  # nobody reads on
        print(f"error: {error.filename}: {reason(error)}. Choose another --out.", file=sys.stderr)
        return 2
    return 0


def title(name: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = shipped.file_of(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=:)\s|(?<=\.)\s(?=[A-Z])", comment)[0].rstrip(":.")


if __name__ == "__main__":
    sys.exit(main())
