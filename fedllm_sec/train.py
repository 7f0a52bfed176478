"""Run a recipe: `accelerate launch -m fedllm_sec.train recipe.yaml [key.sub=value ...]`.

Started again with the same recipe it goes on where it was stopped; a finished run is only reported.
"""

from __future__ import annotations

import argparse
import functools
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.recipe import reading as recipes
from fedllm_sec.recipe.reading import Recipe
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.records.history import RoundRecord, RunFolder, read_history, write_json
from fedllm_sec.records.outcomes import lifespan


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fedllm_sec.train",
        description="Federated fine-tuning under attack and defense, from one recipe.",
        epilog="example: accelerate launch -m fedllm_sec.train recipes/quickstart.yaml rounds=3 clients.lr=1e-3",
    )
    parser.add_argument("recipe", type=Path, help="the YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's")
    parser.add_argument("--only", metavar="VARIANT", help="run this one of the recipe's variants")
    parser.add_argument("--check", action="store_true", help="check the recipe and stop")
    parser.add_argument("--explain", action="store_true", help="say what it would do and cost, and stop")
    options = parser.parse_intermixed_args(argv)
    try:
        variants = load(options.recipe, options.overrides)
        if options.only is not None:
            if options.only not in variants:
                raise RecipeError(
                    f'--only: there is no variant "{options.only}".{did_you_mean(options.only, variants)}'
                )
            variants = {"": variants[options.only]}
        if options.check:
            print(f"{options.recipe}: fine ({len(variants)} run{'s' if len(variants) > 1 else ''}).")
            return 0
        if options.explain:
            from fedllm_sec.build.explain import explain

            print(explain(variants))
            return 0
        run_all(variants, _command(options))
    except FedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole round.", file=sys.stderr)
        return 130
    return 0


def _command(options: argparse.Namespace) -> str:
    only = [] if options.only is None else ["--only", options.only]
    words = ["accelerate", "launch", "-m", "fedllm_sec.train", str(options.recipe), *options.overrides, *only]
    return shlex.join(words)


# ---------------------------------------------------------------- recipe


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The runs a recipe asks for, by variant name ("" where it is one run); all mistakes at once."""
    from fedllm_sec.build.federation import menu_problems, rehearse

    raw = recipes.read(path, overrides)
    if "axes" in raw:
        raise RecipeError(f"{path}: is a grid. Run it with python -m fedllm_sec.benchmark {path}.")
    raw.setdefault("output", {})
    if isinstance(raw["output"], dict):
        raw["output"]["folder"] = str(raw["output"].get("folder", "runs/{name}")).replace("{name}", path.stem)
    changes = raw.pop("variants", None) or {"": {}}
    if not isinstance(changes, dict) or not all(isinstance(v, dict) for v in changes.values()):
        raise RecipeError("variants: must map names to blocks of overrides, e.g. {defended: {enable_defense: true}}.")
    found: dict[str, Recipe] = {}
    problems: dict[str, None] = {}
    for name, change in changes.items():
        try:
            recipe = recipes.check(recipes.merge(raw, change), menu_problems)
            rehearse(recipe)
            if name:
                folder = f"{recipe.output.folder}/{name}"
                recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"folder": folder})})
            found[name] = recipe
        except RecipeError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise RecipeError(list(problems))
    return found


# ---------------------------------------------------------------- runs


def run_all(variants: dict[str, Recipe], command: str) -> Path:
    """Run every variant, then write one report over them; gives the folder."""
    from fedllm_sec.build.loaded import Loaded

    quiet()
    first = next(iter(variants.values()))
    folder = Path(first.output.folder).parent if "" not in variants else Path(first.output.folder)
    machine = make_machine(first, folder)
    loaded = Loaded()
    for name, recipe in variants.items():
        if machine.main and name:
            print(f"\n{name}: {recipe.output.folder}", flush=True)
        run_one(recipe, machine, command, loaded)
    if machine.main:
        from fedllm_sec.report.page import terminal_summary, write_report

        if "" not in variants:
            write_json(folder / "comparison.json", {"variants": list(variants), "command": command})
        print("\n" + terminal_summary(folder))
        print(f"\nreport: {write_report(folder)}")
    machine.accelerator.end_training()
    return folder


def make_machine(recipe: Recipe, folder: Path, most_threads: int | None = None) -> Any:
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


def run_one(recipe: Recipe, machine: Any, command: str, loaded: Any, say: Callable[[str], None] | None = None) -> None:
    """One run from where its folder stands to its last round, with the final adapter or model and summary.json.

    `loaded` is what the process keeps between runs; `say` gets a line a round instead of the terminal.
    """
    import torch

    from fedllm_sec.build.federation import build, run, save

    on_terminal, say = say is None, say or functools.partial(print, flush=True)
    folder, text = RunFolder(Path(recipe.output.folder)), recipes.dump(recipe)
    state = folder.resume(text)
    if state is not None and state["round"] >= recipe.rounds and (folder.path / "summary.json").exists():
        if machine.main:
            say(f"already done: {folder.path} ({state['round']} rounds). Remove the folder to run it again.")
        return
    federation = build(recipe, machine, loaded)
    task = federation.task
    if state is not None:
        federation.load_state_dict(_to(state, machine.device))
        if machine.main:
            say(f"going on after round {federation.round} of {folder.path}")
    if machine.main:
        folder.begin(text, environment(command, machine), state)
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
            machine.accelerator.log(_scalars(record), step=record.round)
    if machine.main:
        keep_model(kind)
        stop = recipe.attack.stop if recipe.enable_attack and recipe.attack is not None else None
        write_json(folder.path / "summary.json", summary(folder.path, command, stop))
    machine.accelerator.wait_for_everyone()


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


# ---------------------------------------------------------------- what people and programs read


def round_line(record: RoundRecord, rounds: int) -> str:
    """One line a round: what it did, in the order people ask."""
    width = len(str(rounds))
    parts = [f"round {record.round:>{width}}/{rounds}"]
    if record.quality is not None:
        parts.append(f"loss {record.quality['loss']:.3f}")
        if record.quality.get("accuracy"):
            parts.append(f"accuracy {record.quality['accuracy']['value']:.3f}")
    if record.attack is not None:
        parts.append(f"ASR {record.attack['asr']['value']:.3f}")
        if record.attack.get("false_trigger"):
            parts.append(f"false triggers {record.attack['false_trigger']['value']:.3f}")
    if record.kept is not None:
        dropped = [id + ("*" if id in record.malicious else "") for id in record.cohort if id not in record.kept]
        parts.append("dropped " + (" ".join(dropped[:8]) + (" ..." if len(dropped) > 8 else "") if dropped else "none"))
    if record.quarantined:
        parts.append(f"quarantined {' '.join(record.quarantined)}")
    if record.skipped:
        parts.append(f"SKIPPED ({record.skipped})")
    parts.append(f"step {record.update_norm:.3g}")
    parts.append(f"{sum(record.seconds.values()):.1f} s")
    return "  ".join(parts)


def _scalars(record: RoundRecord) -> dict[str, float]:
    """The numbers of a round for a tracker."""
    flat: dict[str, float] = {"update_norm": record.update_norm}
    if record.robustness is not None:
        flat["robustness"] = record.robustness
    for group in ("quality", "attack", "detection", "stealth"):
        for name, value in (getattr(record, group) or {}).items():
            number = value["value"] if isinstance(value, dict) else value
            if number is not None:
                flat[f"{group}/{name}"] = number
    return flat


def summary(folder: Path, command: str, stop: int | None = None) -> dict[str, Any]:
    """The last measured round, the totals, and how long the attack outlived its last round `stop`."""
    records = read_history(folder)
    measured = [r for r in records if r.quality is not None]
    last = measured[-1] if measured else None
    names = sorted({name for r in records for name in r.seconds})
    return {
        "rounds": len(records),
        "quality": last.quality if last else None,
        "attack": last.attack if last else None,
        "detection": last.detection if last else None,
        "robustness": last.robustness if last else None,
        "stealth": last.stealth if last else None,
        "lifespan": lifespan(records, stop),
        "skipped_rounds": sum(r.skipped is not None for r in records),
        "quarantined": sum(len(r.quarantined) for r in records),
        "seconds": {name: round(sum(r.seconds.get(name, 0.0) for r in records), 3) for name in names},
        "command": command,
    }


def environment(command: str, machine: Any) -> dict[str, Any]:
    """Where and with what the run was made."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "numba", "bitsandbytes")
    return {
        "command": command,
        "fedllm_sec": installed("fedllm_sec"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in packages},
        "device": _device_name(machine),
        "processes": machine.world,
        "placement": machine.placement,
        "mixed_precision": machine.accelerator.mixed_precision,
    }


def _device_name(machine: Any) -> str:
    import torch

    return torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else str(machine.device)


def _commit() -> str | None:
    """The git commit of the package's source, "-dirty" where it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def quiet() -> None:
    """One line a round is what people should see: no bars over maps and weight loading, no notes between libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
