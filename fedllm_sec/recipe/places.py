"""Where a name in a recipe leads: the home folder, a place on this disk, or the hub."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading

from fedllm_sec.errors import RecipeError

PATIENCE = 3.0  # seconds in which the hub must give any answer at all


def home(path: str) -> str:
    """The path with `~` or `~user` at its beginning as that home folder."""
    made = os.path.expanduser(path)
    if made.startswith("~"):
        raise RecipeError(f"{path}: no home folder is known for this. Write the whole path, or ./{path}.")
    return made


def here() -> str:
    """The working directory, from which relative paths of a recipe lead."""
    return os.getcwd()


def is_local(name: str) -> bool:
    """Whether a name can only be a path: hub names are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep + os.sep in name or "\0" in name


@functools.cache
def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None; this process then uses what was downloaded before and asks no more.

    The libraries would try for half a minute, and again for each file.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        except Exception:  # no answer, whatever kind the client of the day raises
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a host obeys no timeout
    asking.start()
    asking.join(PATIENCE)
    if answered.is_set():
        return None
    constants.HF_HUB_OFFLINE = True
    if "datasets.config" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return "the hub cannot be reached"


def why(error: BaseException) -> str:
    """The first line of what a library said, without addresses."""
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return re.sub(r"\s*\(?https?://\S+", "", line)
