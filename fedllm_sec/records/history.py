"""The run folder: one JSON line a round, and an atomic checkpoint from which a killed run goes on exactly.

history.jsonl holds what is reproducible and is byte-identical between a straight and a resumed run; wall-clock times
go to timings.jsonl. A round's line is written with its checkpoint: a line without a checkpoint is dropped on resume
and made again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import ResumeError

if TYPE_CHECKING:
    from torch import Tensor


# What stands in `quality` and `attack` beside the measures: rates of each class, why a rate is None, rows left out.
DETAILS = ("per_class", "reasons", "left_out")


@dataclass(frozen=True)
class RoundRecord:
    """Everything one round is remembered by. None means "not measured", never 0."""

    round: int  # from 1
    cohort: list[str]  # ids of the clients that took part
    malicious: list[str]  # those of them that are malicious: for evaluation and report only
    attacking: bool  # whether the attack was active in this round
    losses: dict[str, float]  # claimed training loss by client id
    norms: dict[str, float]  # norm of the row each client submitted (after the attack)
    quarantined: dict[str, str]  # id -> reason, rows screened out before the defense
    weights: dict[str, float] | None  # row weights the rule gave
    kept: list[str] | None  # ids the rule kept, for rules that select
    scores: dict[str, float] | None  # suspicion by id, higher is worse
    notes: dict[str, float]  # other numbers of the rule
    update_norm: float  # norm of the step the server took
    skipped: str | None  # why the round left the model as it was
    lora_gap: float | None  # relative error of averaging A and B apart instead of B A
    detection: dict[str, float | None] | None  # tpr, fpr, auc
    quality: dict[str, Any] | None  # measures on clean held-out data; rates as {value, low, high, n}, and DETAILS
    attack: dict[str, Any] | None  # asr, false_trigger as {value, low, high, n}, and DETAILS
    # Older run folders lack what follows. `robustness`: ||update - honest mean||^2 / honest variance; `stealth`: norm
    # and cosine rank of the malicious rows among the honest ones, each 0..1.
    robustness: float | None = None
    stealth: dict[str, float | None] | None = None
    # The rest is not reproducible and goes to timings.jsonl. `memory_mb`: MiB that the "defense" took at its peak, and
    # the peak of the whole "process" up to then.
    seconds: dict[str, float] = field(default_factory=dict)
    memory_mb: dict[str, float] = field(default_factory=dict)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a kill, sees either the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # mkstemp makes it private
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_atomic(path, (json.dumps(_plain(value), indent=2, allow_nan=False) + "\n").encode())


PEAK = "_peak_mb"


def record_line(record: RoundRecord) -> str:
    """The line of history.jsonl for one record (without its timings)."""
    fields = asdict(record)
    del fields["seconds"], fields["memory_mb"]
    return json.dumps(_plain(fields), allow_nan=False) + "\n"


def timing_line(record: RoundRecord) -> str:
    """The line of timings.jsonl for one record: seconds by name, and memory as NAME_peak_mb."""
    memory = {f"{name}{PEAK}": value for name, value in record.memory_mb.items()}
    return json.dumps({"round": record.round, **_plain(record.seconds), **memory}) + "\n"


def read_history(folder: Path) -> list[RoundRecord]:
    """The records of a run folder, with their timings where there are any; what an older folder lacks is None."""
    path = folder / "history.jsonl"
    if not path.is_file():
        raise ResumeError(f"{path}: no such file. Is {folder} a run folder?")
    timings: dict[int, dict[str, float]] = {}
    if (folder / "timings.jsonl").is_file():
        for line in _lines(folder / "timings.jsonl"):
            with contextlib.suppress(json.JSONDecodeError, TypeError, KeyError, AttributeError):  # seconds, no results
                row = json.loads(line)
                timings[row.pop("round")] = row
    records: list[RoundRecord] = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            timing = timings.get(row["round"], {})
            seconds = {name: value for name, value in timing.items() if not name.endswith(PEAK)}
            memory = {name.removesuffix(PEAK): value for name, value in timing.items() if name.endswith(PEAK)}
            records.append(RoundRecord(**row, seconds=seconds, memory_mb=memory))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ResumeError(f"{path}, line {number}: not a round record ({error}).") from error
        if records[0].round not in (0, 1) or records[-1].round != records[0].round + number - 1:
            raise ResumeError(
                f"{path}, line {number}: is round {records[-1].round!r}. A line is lost, doubled or moved."
            )
    return records


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ResumeError(f"{path}: is not UTF-8 text ({error.reason}). Restore it.") from error


# ---------------------------------------------------------------- checkpoints


def _take_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON value in which every tensor stands as {"tensor": its key}; the tensors go into `tensors`."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[str(k), _take_tensors(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_tensors(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ResumeError(
        f"checkpoint: {path} is a {type(value).__name__}; state may hold tensors, numbers, text and dicts."
    )


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {k: _put_tensors(v, tensors) for k, v in value["dict"]}
    if "list" in value:
        return [_put_tensors(v, tensors) for v in value["list"]]
    return value["value"]


class RunFolder:
    """A run on disk: recipe.yaml, environment.json, history.jsonl, timings.jsonl, checkpoint.safetensors, adapter/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history = path / "history.jsonl"
        self.checkpoint = path / "checkpoint.safetensors"

    def resume(self, recipe_text: str) -> dict[str, Any] | None:
        """The state after the last whole round, or None for a new run; the folder is then ready to go on.

        A recipe other than the one the folder was made with is an error, as is a checkpoint that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        recipe = self.path / "recipe.yaml"
        if recipe.exists():
            changed = changes(recipe.read_text(encoding="utf-8"), recipe_text)
            if changed:
                raise ResumeError(
                    f"{self.path}: was made with another recipe: {'; '.join(changed[:5])}. "
                    "Undo the change, or give output.folder another name."
                )
        elif self.history.exists() or self.checkpoint.exists():
            raise ResumeError(f"{self.path}: has a history but no recipe.yaml. Give output.folder another name.")
        if not self.checkpoint.exists():
            if self.history.exists() and self.history.read_bytes().count(b"\n") > 1:
                raise ResumeError(
                    f"{self.path}: history.jsonl has rounds but checkpoint.safetensors is gone. Restore it, or give "
                    "output.folder another name."
                )
            return None
        try:
            with safe_open(str(self.checkpoint), framework="pt") as file:
                described = json.loads(file.metadata()["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            state = _put_tensors(described, tensors)
            size = int(state["history_bytes"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ResumeError(
                f"{self.checkpoint}: cannot be read ({error}). Restore it, or start another folder."
            ) from error
        if not self.history.exists() or self.history.stat().st_size < size:
            raise ResumeError(
                f"{self.history}: is shorter than its checkpoint says ({size} bytes). "
                "Restore it, or start another folder."
            )
        self._refuse_damage(size, state.get("round"))
        return dict(state)

    def _refuse_damage(self, size: int, done: Any) -> None:
        """The history up to its checkpoint must hold the rounds that it stands for; said before any is trained."""
        lines = self.history.read_bytes()[:size]
        try:
            rounds = [json.loads(line)["round"] for line in lines.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise ResumeError(f"{self.history}: is damaged ({error}). Restore it, or start another folder.") from error
        if rounds != list(range(1, len(rounds) + 1)) or done != len(rounds):
            raise ResumeError(
                f"{self.path}: the checkpoint is of round {done!r}, history.jsonl holds rounds {rounds[:3]} ... "
                f"{rounds[-1:]}. Restore both, or start another folder."
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else works in this folder; the system lets go of it when the process ends, however it ends."""
        import fcntl  # not on Windows, where reports are read all the same

        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = os.fstat(file.fileno()).st_ino == path.stat().st_ino  # else the last holder has just removed it
            except OSError:
                mine = False
            if not mine:
                file.seek(0)
                raise ResumeError(
                    f"{self.path}: is being run by process {file.read().strip() or 'unknown'}. Wait for it, stop it, "
                    "or give output.folder another name."
                )
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def begin(self, recipe_text: str, environment: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
        """Write what identifies the run, and cut the history back to the checkpoint: a killed round is replayed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.*.*"):  # `write_atomic` was killed
            left.unlink()
        write_atomic(self.path / "recipe.yaml", recipe_text.encode())
        write_json(self.path / "environment.json", environment)
        size = int(state["history_bytes"]) if state is not None else 0
        done = int(state["round"]) if state is not None else 0
        self.history.touch()
        with self.history.open("r+b") as file:
            file.truncate(size)
        timings = self.path / "timings.jsonl"
        if timings.exists():
            kept = []
            for line in timings.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError, KeyError):
                    if json.loads(line)["round"] <= done:
                        kept.append(line + "\n")
            write_atomic(timings, "".join(kept).encode())

    def append(self, record: RoundRecord, state: Mapping[str, Any]) -> None:
        """Add a round's line, then the checkpoint that makes it count."""
        from safetensors.torch import save

        for path, line in ((self.path / "timings.jsonl", timing_line(record)), (self.history, record_line(record))):
            with path.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        tensors: dict[str, Tensor] = {}
        described = _take_tensors({**state, "history_bytes": self.history.stat().st_size}, "state", tensors)
        write_atomic(self.checkpoint, save(tensors, metadata={"state": json.dumps(described)}))


def changes(old_text: str, new_text: str) -> list[str]:
    """The recipe keys whose values differ, as "clients.lr: 0.001 -> 0.01"."""
    import yaml

    def flat(value: Any, place: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {
                k: v for key, part in value.items() for k, v in flat(part, f"{place}.{key}" if place else key).items()
            }
        return {place: value}

    try:
        old, new = flat(yaml.safe_load(old_text), ""), flat(yaml.safe_load(new_text), "")
    except yaml.YAMLError:
        return ["its recipe.yaml is not YAML"]
    return [
        f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
