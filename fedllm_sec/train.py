"""Run a recipe: `accelerate launch -m fedllm_sec.train recipe.yaml [key.sub=value ...]`.

Started again with the same recipe it goes on where it was stopped; a finished run is only reported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.recipe import reading, shipped
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.environment import environment
from fedllm_sec.records.history import RunFolder, write_json
from fedllm_sec.records.summary import round_line, scalars, summary

if TYPE_CHECKING:
    from fedllm_sec.build.loaded import Loaded
    from fedllm_sec.build.plan import Plan
    from fedllm_sec.rounds.compute import Machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fedllm_sec.train",
        description="Federated fine-tuning under attack and defense, from one recipe.",
        epilog="example: accelerate launch -m fedllm_sec.train recipes/quickstart.yaml rounds=3 clients.lr=1e-3",
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe, or the name of a shipped one, e.g. quickstart")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--only", metavar="VARIANT", action="append", help="run this one of the recipe's variants; may be given again"
    )
    parser.add_argument("--check", action="store_true", help="check the recipe and stop")
    parser.add_argument("--explain", action="store_true", help="say what it would do and cost, and stop")
    options = parser.parse_intermixed_args(argv)
    heed_ctrl_c()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        plans = load(options.recipe, options.overrides)
        among = list(plans)
        if options.only is not None:
            plans = chosen(plans, options.only)
        if options.check:
            print(f"{options.recipe}: fine ({len(plans)} run{'s' if len(plans) > 1 else ''}).")
            return 0
        if options.explain:
            from fedllm_sec.build.explain import explain

            print(explain(plans))
            return 0
        run_all(plans, _command(options), among)
        idle = [plan.recipe.output.folder for plan in plans.values() if _all_skipped(Path(plan.recipe.output.folder))]
        if idle:
            print(f"error: every round was skipped in {', '.join(idle)}: nothing was learnt.", file=sys.stderr)
            return 1
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        print(f"error: {what}. What was written is whole: the same command goes on from there.", file=sys.stderr)
        return 2
    except Terminated:
        print("terminated; the same command goes on from the last whole round.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole round.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it."""


def _terminate(*_: object) -> None:
    raise Terminated


def _all_skipped(folder: Path) -> bool:
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found["rounds"] == found["skipped_rounds"] > 0


def heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored: `kill -INT` and Ctrl-C are to stop those as well."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _command(options: argparse.Namespace) -> str:
    only = [word for name in options.only or () for word in ("--only", name)]
    words = ["accelerate", "launch", "-m", "fedllm_sec.train", str(options.recipe), *options.overrides, *only]
    return shlex.join(words)


# ---------------------------------------------------------------- file -> raw -> checked recipe -> plan


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Plan]:
    """The runs a recipe asks for, by variant name ("" where it is one run); all mistakes at once."""
    from fedllm_sec.build.names import checked
    from fedllm_sec.build.plan import planned

    path = shipped.find(path)
    raw = reading.read(path, overrides)
    if "axes" in raw:
        raise RecipeError(f"{path}: is a grid. Run it with python -m fedllm_sec.benchmark {path}.")
    output = raw.setdefault("output", {})
    if isinstance(output, dict) and isinstance(folder := output.get("folder", "runs/{name}"), str):
        output["folder"] = folder.replace("{name}", path.stem)
    changes = reading.variants(raw.pop("variants", None))
    found: dict[str, Plan] = {}
    problems: dict[str, None] = {}
    for name, change in changes.items():
        try:
            recipe = checked(reading.merge(raw, change))
            if name:
                folder = f"{recipe.output.folder}/{name}"
                recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"folder": folder})})
            found[name] = planned(recipe)
        except RecipeError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems))
    return found


def chosen(plans: dict[str, Plan], names: Sequence[str]) -> dict[str, Plan]:
    """The variants of these names, in the recipe's order; one alone is a run like any other."""
    for name in names:
        if name not in plans:
            raise RecipeError(f'--only: there is no variant "{name}".{did_you_mean(name, plans)}')
    found = {name: plan for name, plan in plans.items() if name in names}
    return found if len(found) > 1 else dict(zip([""], found.values(), strict=True))


# ---------------------------------------------------------------- runs


def run_all(plans: dict[str, Plan], command: str, among: Sequence[str] = ()) -> Path:
    """Run every variant, then write one report; gives the folder.

    `among` are all variants of the recipe: the report is also about those that an earlier command ran.
    """
    from fedllm_sec.build.loaded import Loaded

    quiet()
    first = next(iter(plans.values())).recipe
    folder = Path(first.output.folder).parent if "" not in plans else Path(first.output.folder)
    machine = make_machine(first, folder)
    loaded = Loaded()
    for name, plan in plans.items():
        if machine.main and name:
            print(f"\n{name}: {plan.recipe.output.folder}", flush=True)
        run_one(plan, machine, command, loaded)
    if machine.main:
        from fedllm_sec.report.page import terminal_summary, write_report

        if "" not in plans:
            there = [name for name in among or plans if name in plans or (folder / name / "history.jsonl").is_file()]
            write_json(folder / "comparison.json", {"variants": there, "command": command})
        print("\n" + terminal_summary(folder))
        print(f"\nreport: {write_report(folder)}")
    machine.accelerator.end_training()
    return folder


def make_machine(recipe: Recipe, folder: Path, most_threads: int | None = None) -> Machine:
    """Device, precision, threads and processes as the recipe wants them; trackers write into `folder`."""
    import torch
    from accelerate import Accelerator

    from fedllm_sec.rounds.compute import Machine

    threads = [n for n in (recipe.compute.threads, most_threads) if n is not None]
    if threads:
        torch.set_num_threads(min(threads))
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
    plan: Plan, machine: Machine, command: str, loaded: Loaded, say: Callable[[str], None] | None = None
) -> None:
    """One run from where its folder stands to its last round, with the final adapter or model and summary.json.

    `loaded` is what the process keeps between runs; `say` gets a line a round instead of the terminal.
    """
    with RunFolder(Path(plan.recipe.output.folder)).held() if machine.main else contextlib.nullcontext():
        _run_held(plan, machine, command, loaded, say)


def _run_held(plan: Plan, machine: Machine, command: str, loaded: Loaded, say: Callable[[str], None] | None) -> None:
    import torch

    from fedllm_sec.build.federation import assemble, run, save

    recipe = plan.recipe
    on_terminal, say = say is None, say or functools.partial(print, flush=True)
    folder, text = RunFolder(Path(recipe.output.folder)), reading.dump(recipe)
    state = folder.resume(text)
    if state is not None and state["round"] >= recipe.rounds and (folder.path / "summary.json").exists():
        if machine.main:
            say(f"already done: {folder.path} ({state['round']} rounds). Remove the folder to run it again.")
        return
    federation = assemble(plan, machine, loaded)
    task = federation.task
    if state is not None:
        federation.load_state_dict(_to(state, machine.device))
        if machine.main:
            say(f"going on after round {federation.round} of {folder.path}")
    if machine.main:
        folder.begin(text, _environment(command, machine), state)
    if recipe.output.tracker is not None:
        for tracker in machine.accelerator.trackers:  # accelerate would log this run to the last one's too
            tracker.finish()
        machine.accelerator.trackers.clear()
        machine.accelerator.init_trackers(folder.path.name, config={"recipe": text})

    def keep_model(name: str) -> None:
        with torch.no_grad():
            task.parameters.copy_(federation.vector)
        save(recipe, task, folder.path / name)

    kind = "adapter" if recipe.task == "causal_lm" else "model"

    federation.progress = _progress(machine.main and on_terminal, lambda: federation.round + 1, recipe.rounds)
    for record in run(federation, recipe.rounds):
        if machine.main:
            folder.append(record, federation.state_dict())
            say(round_line(record, recipe.rounds))
            every = recipe.output.adapter_every
            if every is not None and record.round % every == 0:
                keep_model(f"{kind}-round-{record.round}")
        if recipe.output.tracker is not None:
            machine.accelerator.log(scalars(record), step=record.round)
    if machine.main:
        keep_model(kind)
        attack = recipe.attack if recipe.enable_attack else None
        stop = attack.stop if attack is not None else None
        found = summary(folder.path, command, attacked=attack is not None, stop=stop)
        write_json(folder.path / "summary.json", {**found, **federation.facts})
    machine.accelerator.wait_for_everyone()


def _environment(command: str, machine: Machine) -> dict[str, Any]:
    import torch

    gpu = machine.device.type == "cuda"
    return environment(
        command,
        device=torch.cuda.get_device_name(machine.device) if gpu else str(machine.device),
        processes=machine.world,
        placement=machine.placement,
        mixed_precision=machine.accelerator.mixed_precision,
    )


def _to(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return [_to(v, device) for v in value] if isinstance(value, list) else value


def _progress(show: bool, round: Callable[[], int], rounds: int) -> Callable[[Sequence[Any]], Iterator[Any]]:
    """A bar over the clients of a round, on a terminal."""
    from tqdm import tqdm

    def bar(cohort: Sequence[Any]) -> Iterator[Any]:
        hide = not show or not sys.stderr.isatty()
        yield from tqdm(cohort, desc=f"round {round()}/{rounds}", unit="client", leave=False, disable=hide)

    return bar


def quiet() -> None:
    """One line a round is what people should see: no bars over maps and weight loading, no notes between libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
