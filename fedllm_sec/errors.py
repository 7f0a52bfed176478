"""Every error a user can cause, and a reader who leaves, which is none.

All are `FedError`, which is also a `ValueError`. A message names the place, the value, the reason and the way out:
`krum: needs n >= 2f + 3 clients, got n=8, f=3. Lower f or raise clients.per_round.`
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

P = ParamSpec("P")
_FORMAT = warnings.formatwarning
CLOSED = 141  # what a shell says of a program whose reader left: 128 + SIGPIPE


def quietly(main: Callable[P, int]) -> Callable[P, int]:
    """A command whose warnings are a line each, and that ends without a word when nobody reads on (`menu | head`)."""

    @functools.wraps(main)
    def until_the_reader_leaves(*args: P.args, **kwargs: P.kwargs) -> int:
        as_before = warnings.formatwarning
        warnings.formatwarning = _warning
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()  # here, not at the interpreter's end, where nobody can catch it
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED
        except KeyboardInterrupt:  # before a command has begun that says more
            print("stopped.", file=sys.stderr)
            return 130
        finally:
            warnings.formatwarning = as_before

    return until_the_reader_leaves


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of ours in a line; others' as Python writes them, with file and line of source."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return _FORMAT(message, category, filename, lineno, line)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in a line, without the usage before them."""

    _words: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = tuple(sys.argv[1:] if args is None else args)
        if "" in self._words:
            self.error("one of the arguments is empty")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        strange = [
            w for w in self._words if w.startswith("--") and w.partition("=")[0] not in self._option_string_actions
        ]
        if strange and "required" in message:  # it was meant for something, which is then missing
            message = f"there is no option {strange[0]}"
        self.exit(2, f"error: {message.rstrip('.')}. ({self.prog} --help)\n")


def reason(error: BaseException) -> str:
    """Why something failed, in a few words: of a file that cannot be read, without Python's number and the path."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at place {error.start} is not {error.encoding.upper()} text"
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """The text with line breaks and control characters, which a name in a recipe may hold, written as Python does."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FedError(ValueError):
    """Something the user asked for cannot be done."""


class RecipeError(FedError):
    """One or more mistakes in a recipe; all of them are reported together."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [printable(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1))
            super().__init__(f"{len(self.problems)} mistakes in the recipe:\n{lines}")


class DataError(FedError):
    """A data set, a column or a shard that cannot be used."""


class AttackError(RecipeError):
    """An attack that cannot act as the recipe asks."""


class CohortError(AttackError):
    """An attack that cannot act in this round because of who takes part in it; in another round it may."""


class IdleAttack(UserWarning):
    """In some round the attackers sent what they had trained, because of who took part in it."""


class DefenseError(FedError):
    """A defense whose inputs or preconditions do not hold."""


class DivergedError(FedError):
    """The global model is no longer made of finite numbers; the last one that was is in the checkpoint."""


class ResumeError(FedError):
    """A run folder that cannot be continued."""
