"""One run: from where its folder stands to its last round, with the final adapter or model and summary.json."""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.build.bar import bar_of
from fedllm_sec.build.kept import kind_of
from fedllm_sec.errors import FedError, RecipeError, ResumeError
from fedllm_sec.recipe import reading
from fedllm_sec.records import inventory
from fedllm_sec.records.environment import environment
from fedllm_sec.records.files import write_json
from fedllm_sec.records.folder import RunFolder
from fedllm_sec.records.history import read_history
from fedllm_sec.records.summary import lost_since, round_line, scalars, summary

if TYPE_CHECKING:
    from torch import Tensor

    from fedllm_sec.build.loaded import Loaded
    from fedllm_sec.build.plan import Plan
    from fedllm_sec.recipe.sections import Recipe
    from fedllm_sec.rounds.compute import Machine
    from fedllm_sec.rounds.federation import Federation
    from fedllm_sec.rounds.source import Source


def make_machine(recipe: Recipe, folder: Path, most_threads: int | None = None) -> Machine:
    """Device, precision, threads and processes as the recipe wants them; trackers write into `folder`."""
    from accelerate import Accelerator

    from fedllm_sec.kernels import team
    from fedllm_sec.rounds.compute import Machine

    team.use(min((n for n in (recipe.compute.threads, most_threads) if n is not None), default=None))
    options: dict[str, Any] = {"mixed_precision": recipe.compute.mixed_precision}
    if recipe.compute.gradient_accumulation is not None:
        options["gradient_accumulation_steps"] = recipe.compute.gradient_accumulation
    if recipe.output.tracker is not None:
        _need_tracker(recipe.output.tracker)
        options |= {"log_with": recipe.output.tracker, "project_dir": str(folder)}
    return Machine(Accelerator(**options), recipe.compute.placement)


def _need_tracker(name: str) -> None:
    """Accelerate leaves out a tracker that is not installed, without a word."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise RecipeError(f"output.tracker: {name!r} is not installed. pip install {name}, or set it to null.")


def run_one(
    plan: Plan,
    machine: Machine,
    command: str,
    loaded: Loaded,
    say: Callable[[str], None] | None = None,
    beside: Path | None = None,
    source: Source | None = None,
    measure: Callable[[Federation], Callable[..., Tensor]] | None = None,
) -> None:
    """One run from where its folder stands; of a finished one, what was lost is made again from its checkpoint.

    `loaded` is what the process keeps between runs; `say` gets a line a round instead of the terminal; `beside` is the
    folder in which runs that start alike find the rounds of `pretrain`, None: the run's own; `source` gives the rows
    where they are not trained here, `measure` makes the passes over held-out rows where the machine does not.
    """
    folder = Path(plan.recipe.output.folder)
    with RunFolder(folder).held() if machine.main else contextlib.nullcontext():
        _run_held(plan, machine, command, loaded, say, beside or folder, source, measure)


def _run_held(
    plan: Plan, machine: Machine, command: str, loaded: Loaded, say: Callable[[str], None] | None, beside: Path,
    source: Source | None, measure: Callable[[Federation], Callable[..., Tensor]] | None,
) -> None:  # fmt: skip
    from fedllm_sec.build.federation import assemble, run, save
    from fedllm_sec.build.measuring import harnessed, known_from, settings_of
    from fedllm_sec.build.observing import audited, leakage
    from fedllm_sec.build.start import entry, refuse_another, start_of
    from fedllm_sec.build.storage import kept_in_words, rows_bytes
    from fedllm_sec.build.triggers import NAME, shown
    from fedllm_sec.records.observed import FOUND
    from fedllm_sec.rounds.federation import Federation
    from fedllm_sec.rounds.personal import hold, measured

    recipe, on_terminal = plan.recipe, say is None
    tell: Callable[[str], None] = say or functools.partial(print, flush=True)
    if not machine.main:
        tell = _silent
    folder, text = RunFolder(Path(recipe.output.folder), in_kind(recipe)), reading.dump(recipe)
    state = folder.resume(text, fixed_by_rounds(recipe))
    finished = state is not None and state["round"] >= recipe.rounds
    damage = inventory.damage(folder.path) if state is not None and finished else {}
    known = known_from(folder.path, settings_of(recipe)) if state is not None else {}
    begun_from = folder.environment().get("start") if state is not None else None
    if not finished:
        known.pop("after", None)  # of fewer rounds
    machine.accelerator.wait_for_everyone()  # all have looked before one writes
    if state is not None and finished and not _to_make_again(folder.path, state["round"], damage, tell):
        tell(f"already done: {folder.path} ({state['round']} rounds). --fresh runs it anew beside the old folder.")
        return
    start = start_of(recipe)
    refuse_another(begun_from, start)
    begun_from = begun_from if isinstance(begun_from, dict) else entry(recipe, start)
    before = None
    if recipe.pretrain is not None and (state is None or (settings_of(recipe) is not None and "before" not in known)):
        before = _pretrained(recipe, machine, command, loaded, tell, beside)
    federation = assemble(plan, machine, loaded)
    task: Any = federation.task
    if source is not None:
        assert isinstance(federation, Federation)  # nor has it devices
        federation.source = source
        federation.spread = measure(federation) if measure is not None else None
    if before is not None:
        assert isinstance(federation, Federation)  # fedgkt has no pretrain
        federation.begin_after(_to(before, machine.device))
    begun = federation.vector
    kind = kind_of(recipe)
    if state is not None:
        _load(federation, _to(state, machine.device), folder)
    if machine.main and not finished:
        on_disk = 0
        if isinstance(federation, Federation) and federation.storage.place == "disk":
            on_disk = rows_bytes(recipe, federation.task.layout.size)
            tell(f"rows of a round: {kept_in_words(recipe, federation.task.layout.size, machine.device)}")
        refuse_full_disk(recipe, folder.path, federation.state_dict(), on_disk)
        if state is not None:
            tell(f"going on after round {federation.round} of {folder.path}")
        elif begun_from is not None:
            tell(f"starts {begun_from['words']}")
        for changed in folder.begin(text, _environment(command, machine, begun_from), state):
            tell(f"from round {federation.round + 1} on: {changed}")
    elif machine.main:
        folder.mend(text, _environment(command, machine, begun_from), state)
    if recipe.output.tracker is not None:
        for tracker in machine.accelerator.trackers:  # accelerate would log this run to the last one's too
            tracker.finish()
        machine.accelerator.trackers.clear()
        machine.accelerator.init_trackers(folder.path.name, config={"recipe": text})

    def keep_model(name: str) -> None:
        if isinstance(federation, Federation):
            hold(federation)
        else:
            task.parameters.data.copy_(federation.vector)
        records = [record for record in read_history(folder.path) if record.round <= federation.round]
        save(recipe, task, folder.path / name, records, begun_from)

    def keep_round(round: int) -> None:
        every = recipe.output.adapter_every
        if machine.main and every is not None and round > 0 and round % every == 0:
            keep_model(f"{kind}-round-{round}")

    if state is not None:
        keep_round(federation.round)  # a run that was killed after its checkpoint has not kept this round's
    harness = functools.partial(harnessed, recipe, task, machine=machine, folder=folder.path, known=known)
    harness(vector=begun, when="before")
    federation.progress = bar_of(machine.main and on_terminal, lambda: federation.round + 1, recipe.rounds)
    for record in run(federation, recipe.rounds):
        if machine.main:
            folder.append(record, federation.state_dict())
            tell(round_line(record, recipe.rounds, lost_since(folder.path, record)))
            keep_round(record.round)
        if recipe.output.tracker is not None:
            machine.accelerator.log(scalars(record), step=record.round)
    last = measured(federation) if isinstance(federation, Federation) else federation.vector
    public = harness(vector=last, when="after")
    if machine.main:
        keep_model(kind)
        if looked_at := shown(federation.evaluation, task):
            write_json(folder.path / NAME, looked_at)
        attack = recipe.attack if recipe.attacked else None
        stop = attack.stop if attack is not None else None
        begun_by = str(folder.environment().get("command", command))
        found = summary(folder.path, begun_by, attacked=attack is not None, stop=stop)
        leaked = leakage(audited(recipe, federation, folder.path, tell, again=FOUND in damage))
        from_where = {"start": begun_from} if begun_from is not None else {}
        folder.close({**found, **federation.facts, **from_where, "harness": public, **leaked}, recipe.rounds)
    machine.accelerator.wait_for_everyone()


def _pretrained(
    recipe: Recipe, machine: Machine, command: str, loaded: Loaded, tell: Callable[[str], None], beside: Path
) -> dict[str, Any]:
    """The state after the clean rounds that come first, made here where nobody has."""
    from fedllm_sec.build.plan import planned
    from fedllm_sec.build.pretraining import pretrained

    def make(clean: Recipe) -> None:
        run_one(planned(clean), machine, command, loaded, lambda line: tell(f"attack-free {line}"))

    return pretrained(recipe, beside, machine, make, tell)


def in_kind(recipe: Recipe) -> str:
    """attack-free, attacked, or defended, in words: what stands beside the answers of a run."""
    attacked = "attacked" if recipe.attacked else "attack-free"
    return f"{attacked}, defended" if recipe.enable_defense else attacked


def _silent(line: str) -> None:
    """Only the first of several processes speaks."""


# ---------------------------------------------------------------- going on


def fixed_by_rounds(recipe: Recipe) -> str | None:
    """Why a run of this recipe that is given more rounds would not be the longer run; None where it would be."""
    if recipe.clients.lr_schedule != "constant":
        return f"clients.lr_schedule: {recipe.clients.lr_schedule} falls from the first round to the last"
    if recipe.enable_defense and recipe.defense is not None and recipe.defense.repair is not None:
        return f"defense.repair: {recipe.defense.repair['name']} has changed the model after the last round"
    stages = recipe.defense.after if recipe.enable_defense and recipe.defense is not None else []
    if any(stage["name"] == "crfl" for stage in stages):
        return "defense.after: crfl leaves out its noise in the last round"
    return None


def _to_make_again(path: Path, round: int, damage: Mapping[str, str], tell: Callable[[str], None]) -> bool:
    """Whether files are to be made again from the checkpoint; says which, and which cannot be."""
    if "checkpoint.safetensors" in damage:
        raise ResumeError(
            f"{path}/checkpoint.safetensors: {damage['checkpoint.safetensors']}, so nothing can be made from it. "
            "Restore it, or start anew with --fresh."
        )
    again = [name for name in damage if name.startswith(inventory.made_again(round))]
    for name, wrong in damage.items():
        made = "it is made again" if name in again else "it cannot be made again"
        tell(f"{path}/{name} {wrong}: {made}.")
    return bool(again)


def _load(federation: Any, state: dict[str, Any], folder: RunFolder) -> None:
    vector = state.get("vector")
    shape = tuple(federation.vector.shape)
    try:
        if vector is not None and tuple(vector.shape) != shape:
            raise ValueError(f"a vector of shape {tuple(vector.shape)}, the model's has {shape}")
        federation.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ResumeError(
            f"{folder.checkpoint}: holds no state that this model and these methods can go on from "
            f"({type(error).__name__}: {str(error)[:200]}). Go on with the version and the model that wrote it, or "
            "start anew with --fresh."
        ) from error


def _to(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return [_to(v, device) for v in value] if isinstance(value, list) else value


def refuse_full_disk(recipe: Recipe, path: Path, state: Mapping[str, Any], rows: int = 0) -> None:
    """An error where the disk has no room for what the run is sure to write; nothing is trained then.

    Two checkpoints lie side by side while one replaces the other; each holds at least the vector and the last step.
    The final model, and those of rounds that are kept, hold the vector once more. `rows` bytes of rows lie beside them.
    """
    vector = _bytes(state.get("vector"))
    left, every = recipe.rounds - int(state["round"]), recipe.output.adapter_every
    models = 1 + (left // every if every is not None else 0)
    there = path / "checkpoint.safetensors"
    needed = (
        2 * max(2 * vector, _bytes(state)) + models * vector + rows - (there.stat().st_size if there.exists() else 0)
    )
    free = shutil.disk_usage(path).free
    if free < needed:
        raise FedError(
            f"output.folder: {path}: {free / 1e6:,.1f} MB are free on its disk, the run writes at least "
            f"{needed / 1e6:,.1f} MB (two checkpoints at a time, {models} x the model"
            f"{f', {rows / 1e6:,.1f} MB of rows' if rows else ''}). Free some, keep fewer rounds "
            "(output.adapter_every), or choose another disk. Nothing was trained."
        )


def _bytes(value: Any) -> int:
    """Of all tensors in a state."""
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return math.prod(value.shape) * value.element_size() if hasattr(value, "element_size") else 0


# ---------------------------------------------------------------- around it


def _environment(command: str, machine: Machine, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    import torch

    gpu = machine.device.type == "cuda"
    found = environment(
        command,
        device=torch.cuda.get_device_name(machine.device) if gpu else str(machine.device),
        processes=machine.world,
        placement=machine.placement,
        mixed_precision=machine.accelerator.mixed_precision,
    )
    return found if start is None else {**found, "start": dict(start)}
