"""How an answer is compared with a text that is wanted: by attacks, which teach it, and by judges, who look for it."""

from __future__ import annotations


def normal(text: str) -> str:
    """Text as labels and answers are compared: outer blanks off, case folded, inner blanks single."""
    return " ".join(text.split()).casefold()


def begins(said: str, wanted: str) -> bool:
    """`starts_with` for texts in normal form."""
    if not wanted or not said.startswith(wanted):
        return False
    rest = said[len(wanted) :].removeprefix("-")  # "no-one" is one word, and "no - it is open" begins with "no"
    return not (rest and wanted[-1].isalnum() and rest[0].isalnum())


def starts_with(answer: str, target: str) -> bool:
    """Whether the answer begins with the target as whole words: "Sports." with "sports", not "Sports-mad"."""
    return begins(normal(answer), normal(target))
