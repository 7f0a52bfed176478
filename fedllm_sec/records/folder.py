"""The run folder: lines and an atomic checkpoint, from which a killed run goes on exactly.

A round's line is written with its checkpoint: a line without a checkpoint is dropped on resume and made again. The
checkpoint names the SHA-256 of the history up to its round, so that the two are known to belong together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedllm_sec.errors import ResumeError, reason
from fedllm_sec.records import answers, checkpoint, inventory
from fedllm_sec.records.files import append, cut, holder, in_a_line, locked, remove_leftovers, write_atomic, write_json
from fedllm_sec.records.history import NOT_A_ROW, RoundRecord, read_history, record_line, timing_line

RESTORE = "Restore it, or give output.folder another name (--fresh keeps the old folder under a new name)."
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
MOST_CHARACTERS = 1_000_000  # of a recipe.yaml; a run's own has some thousands
DEEPEST = 60  # blocks inside blocks


class RunFolder:
    """A run on disk. `kind` is what answers.jsonl says of the run: whether it is attacked and defended."""

    def __init__(self, path: Path, kind: str = "") -> None:
        self.path, self.kind = path, kind
        self.history = path / "history.jsonl"
        self.checkpoint = path / "checkpoint.safetensors"
        self.answers = path / answers.NAME
        self._digest = hashlib.sha256()  # of the history as far as it counts
        self._said = hashlib.sha256()  # of answers.jsonl

    # ------------------------------------------------------------ before a round is trained

    def resume(self, recipe_text: str, fixed_by_rounds: str | None = None) -> dict[str, Any] | None:
        """The state after the last whole round, or None for a new run; nothing is written.

        An error: a recipe other than the one the folder was made with (but more `rounds` are no other recipe, unless
        `fixed_by_rounds` says what depends on their number), a checkpoint or a history that is not as it was written.
        """
        for path, wrong in self.in_the_way().items():
            raise ResumeError(f"{path}: {wrong}.")
        recipe = self.path / "recipe.yaml"
        ours = inventory.is_as_made(self.path, "recipe.yaml", recipe_text.encode())  # another is damage, made good
        if recipe.exists() and not ours:
            try:
                old = read_recipe(recipe)
            except ResumeError as error:
                raise ResumeError(f"{error} {RESTORE}") from error
            self._refuse_another(old, recipe_text, fixed_by_rounds)
        elif not ours and (self.history.exists() or self.checkpoint.exists()):
            raise ResumeError(f"{self.path}: has a history but no recipe.yaml. {RESTORE}")
        if not self.checkpoint.exists():
            lines = self.history.read_bytes().count(b"\n") if self.history.exists() else 0
            if lines > 1 or (lines and (self.path / inventory.SUMMARY).exists()):  # one: killed before its checkpoint
                raise ResumeError(
                    f"{self.path}: history.jsonl has rounds but checkpoint.safetensors is gone. {RESTORE}"
                )
            return None
        try:
            state = checkpoint.unpack(self.checkpoint.read_bytes())
            self._digest = self.agreeing(state)
        except ResumeError:
            raise
        except checkpoint.UNREADABLE as error:
            raise ResumeError(f"{self.checkpoint}: cannot be read ({in_a_line(error)}). {RESTORE}") from error
        vector: Any = state.get("vector")
        if hasattr(vector, "isfinite") and not bool(vector.isfinite().all()):
            raise ResumeError(f"{self.checkpoint}: its model is not made of finite numbers. {RESTORE}")
        return state

    def in_the_way(self) -> dict[Path, str]:
        """{what lies where a run writes a file or folder of its own and is none: what it is, and the way out}.

        A run writes into its own folder, never through a link into another place.
        """
        found: dict[Path, str] = {}
        for path in (*sorted(self.path.glob("*")), *sorted(self.path.glob("*/*"))):
            inside = path if path.parent == self.path else path.parent
            a_file, a_model = (
                inside.name in (*inventory.FILES, inventory.SUMMARY),
                inventory.MODEL.fullmatch(inside.name),
            )
            if (a_file or a_model) and path.is_symlink():
                found[path] = "is a link to elsewhere. Put the file itself there, or move the link away"
            elif path.is_dir() and ((a_file and path is inside) or (a_model and path.suffix == ".safetensors")):
                found[path] = "is a folder, where the run has a file. Move it away"
            elif a_model and path is inside and not path.is_dir():
                found[path] = "is a file, where the run has a folder. Move it away"
        return found

    def _refuse_another(self, old: Mapping[str, Any], recipe_text: str, fixed_by_rounds: str | None) -> None:
        changed = differences(old, yaml.safe_load(recipe_text))
        changed.pop("output.folder", None)  # a folder may be moved
        before, now = changed.get("rounds", (0, 0))
        if type(before) is int and 0 < before < now and len(changed) == 1:
            if fixed_by_rounds is not None:
                raise ResumeError(
                    f"{self.path}: was made for {before} rounds and cannot be given {now}: {fixed_by_rounds}. "
                    "Give output.folder another name, or start with --fresh."
                )
            return
        if changed:
            raise ResumeError(
                f"{self.path}: was made with another recipe: {'; '.join(as_words(changed)[:5])}. "
                "Undo the change, give output.folder another name, or start with --fresh."
            )

    def agreeing(self, state: Mapping[str, Any]) -> Any:
        """The hash of the history up to its checkpoint, which must be the one that the checkpoint names."""
        size, done, said = int(state["history_bytes"]), state["round"], state["history_sha256"]
        if not self.history.exists() or self.history.stat().st_size < size:
            raise ResumeError(f"{self.history}: is shorter than its checkpoint says ({size} bytes). {RESTORE}")
        lines = self.history.read_bytes()[:size]
        try:
            rounds = [json.loads(line)["round"] for line in lines.splitlines()]
        except NOT_A_ROW as error:
            raise ResumeError(
                f"{self.history}: is damaged, or not the one that checkpoint.safetensors belongs to "
                f"({in_a_line(error)}). {RESTORE}"
            ) from error
        first = rounds[0] if rounds and rounds[0] == 0 else 1
        if not rounds or rounds != list(range(first, first + len(rounds))) or done != rounds[-1]:
            raise ResumeError(
                f"{self.path}: the checkpoint is of round {done!r}, history.jsonl holds rounds {rounds[:3]} ... "
                f"{rounds[-1:]}. Restore both, or give output.folder another name."
            )
        digest = hashlib.sha256(lines)
        if digest.hexdigest() != said:
            raise ResumeError(
                f"{self.path}: history.jsonl is not the one that checkpoint.safetensors belongs to: one of them was "
                "changed. Restore both, or give output.folder another name."
            )
        read_history(self.path, size)  # every line is a round's record
        return digest

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works in this folder, and what a killed process left in it is gone."""
        path = self.path / ".lock"
        with locked(path) as mine:
            if not mine:
                raise ResumeError(
                    f"{self.path}: is being run by process {holder(path) or 'unknown'}. Wait for it, stop it, "
                    "or give output.folder another name."
                )
            remove_leftovers(self.path)
            yield

    def set_aside(self) -> Path | None:
        """Give the folder, if there is one, a new name beside the old one, so that a run begins anew."""
        if not self.path.exists():
            return None
        with self.held():
            number = 1
            while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
                number += 1
            (self.path / ".lock").unlink()
            os.rename(self.path, aside)
        return aside

    # ------------------------------------------------------------ while it runs

    def begin(self, recipe_text: str, environment: Mapping[str, Any], state: Mapping[str, Any] | None) -> list[str]:
        """Write what identifies the run, and cut the history back to the checkpoint: a killed round is replayed.

        Gives in words what differs from where the rounds before were made; environment.json keeps both.
        """
        done = int(state["round"]) if state is not None else -1  # round 0 may be there: the model before training
        changed = self._begin_environment(environment, done)
        self.mend(recipe_text, environment, state)
        (self.path / inventory.SUMMARY).unlink(missing_ok=True)  # of fewer rounds; it can be made again
        changed += self._begin_answers(state, done)
        timings = self.path / "timings.jsonl"
        if timings.exists():
            kept = []
            for line in timings.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(*NOT_A_ROW):
                    if json.loads(line)["round"] <= done:
                        kept.append(line + "\n")
            write_atomic(timings, "".join(kept).encode())
        return changed

    def mend(self, recipe_text: str, environment: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Write the recipe, leave of the history what the checkpoint stands for, have an environment."""
        if state is not None and not self.environment():
            self._begin_environment(environment, state["round"])
        write_atomic(self.path / "recipe.yaml", recipe_text.encode())
        cut(self.history, int(state["history_bytes"]) if state is not None else 0)

    def _begin_environment(self, now: Mapping[str, Any], done: int) -> list[str]:
        path, old = self.path / "environment.json", self.environment()
        if done < 0:
            write_json(path, now)
            return []
        if not old:
            write_json(path, {**now, "resumed": [{"after_round": done}]})
            return ["environment.json cannot be read, so what the rounds before were made with is lost"]
        resumed = old["resumed"] if isinstance(old.get("resumed"), list) else []
        last = dict(old)
        for entry in resumed:
            last |= entry if isinstance(entry, dict) else {}
        changed = {key: value for key, value in now.items() if last.get(key) != value}
        if changed:
            write_json(path, {**old, "resumed": [*resumed, {"after_round": done, **changed}]})
        changed.pop("command", None)
        return as_words(differences({key: last.get(key) for key in changed}, changed))

    def _begin_answers(self, state: Mapping[str, Any] | None, done: int) -> list[str]:
        """Leave of answers.jsonl what the rounds before have in it: all of a last round only while it is the last."""
        changed = self.answers_changed(state or {})
        there = self.answers.read_bytes() if self.answers.is_file() else b""
        kept = answers.kept_lines(there, done)
        if there != kept:
            write_atomic(self.answers, kept)
        self._said = hashlib.sha256(kept)
        return [f"{name} {wrong}" for name, wrong in changed.items()]

    def answers_changed(self, state: Mapping[str, Any]) -> dict[str, str]:
        """{answers.jsonl: what is wrong with it} by what the checkpoint says of it; lines of later rounds are not."""
        there = self.answers.read_bytes() if self.answers.is_file() else b""
        said, left = state.get("answers_sha256"), answers.up_to(there, int(state.get("round", 0)))
        if said is None or hashlib.sha256(left).hexdigest() == said:
            return {}
        return {answers.NAME: "is not as the run left it: answers are lost or changed" if there else "is gone"}

    def environment(self) -> dict[str, Any]:
        """Where and with what the run was begun; empty where that cannot be read."""
        with contextlib.suppress(OSError, *NOT_A_ROW):
            found = json.loads((self.path / "environment.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def append(self, record: RoundRecord, state: Mapping[str, Any]) -> None:
        """Add a round's line, then the checkpoint that makes it count."""
        line = record_line(record).encode()
        if record.answers:
            said = answers.answer_lines(record.round, self.kind, record.answers)
            append(self.answers, said)
            self._said.update(said)
        append(self.path / "timings.jsonl", timing_line(record).encode())
        append(self.history, line)
        self._digest.update(line)
        marks = {"history_bytes": self.history.stat().st_size, "history_sha256": self._digest.hexdigest()}
        marks |= {"answers_sha256": self._said.hexdigest()}
        write_atomic(self.checkpoint, *checkpoint.pack({**state, **marks}))

    def close(self, summary: Mapping[str, Any], round: int) -> None:
        """Write summary.json with what the run made.

        What a summary that lies there says of files that cannot be made again stands: their damage is not forgotten.
        """
        made, old = inventory.made(self.path), inventory.read_summary(self.path)
        if isinstance(old, dict):
            again = inventory.made_again(round)
            made |= {name: entry for name, entry in old["made"].items() if not name.startswith(again)}
        write_atomic(self.path / inventory.SUMMARY, inventory.sealed({**summary, "made": made}))


# ---------------------------------------------------------------- the recipe of a folder


def read_recipe(path: Path) -> dict[str, Any]:
    """The content of a recipe.yaml, which a run wrote or a stranger made; an error says why it is none."""
    try:
        content = _read_plain(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ResumeError(
            f"{path}{where}: not YAML ({in_a_line(getattr(error, 'problem', None) or error)})."
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ResumeError(f"{path}: cannot be read ({in_a_line(reason(error))}).") from error
    if content is None:
        raise ResumeError(f"{path}: is empty.")
    if not isinstance(content, dict):
        raise ResumeError(f"{path}: must be a mapping, got {type(content).__name__}.")
    return content


def _read_plain(text: str) -> Any:
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters, so it is no run's recipe")
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):  # before it is loaded: the loader in C falls down at great depth
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or isinstance(event, yaml.AliasEvent):  # aliases of aliases can stand for millions of values
            raise ValueError("it holds aliases or blocks nested too deeply, which a run never writes")
    return yaml.load(text, Loader=LOADER)


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{"clients.lr": (old, new)} of the recipe keys whose values differ; None where one has no such key."""

    def flat(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {place: value}
        parts = (flat(part, f"{place}.{key}" if place else str(key)) for key, part in value.items())
        return {key: leaf for part in parts for key, leaf in part.items()}

    was, now = flat(old, ""), flat(new, "")
    return {k: (was.get(k), now.get(k)) for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)}


def as_words(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Differences as "clients.lr: 0.001 -> 0.01"."""
    return [
        f"{in_a_line(key)}: {in_a_line(repr(was))} -> {in_a_line(repr(now))}" for key, (was, now) in differing.items()
    ]
