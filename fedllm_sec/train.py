"""Run a recipe: `accelerate launch -m fedllm_sec.train recipe.yaml [key.sub=value ...]`.

Started again with the same recipe it goes on where it was stopped. Of a finished run it makes again what was lost and
can be made from the checkpoint; one that is whole is only reported.
"""

from __future__ import annotations

import errno
import json
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm_sec.errors import FedError, Parser, RecipeError, quietly
from fedllm_sec.recipe import places, reading, shipped
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.records.environment import typed
from fedllm_sec.records.files import remove_leftovers, write_json
from fedllm_sec.records.folder import RunFolder

if TYPE_CHECKING:
    from fedllm_sec.build.plan import Plan


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m fedllm_sec.train",
        description="Federated fine-tuning under attack and defense, from one recipe.",
        epilog="example: accelerate launch -m fedllm_sec.train recipes/quickstart.yaml rounds=3 clients.lr=1e-3",
    )
    parser.add_argument(
        "recipe", type=Path, nargs="?", help="the YAML recipe, or the name of a shipped one, e.g. quickstart"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--only", metavar="VARIANT", action="append", help="run this one of the recipe's variants; may be given again"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew; a folder that is there is kept under a new name beside it"
    )
    parser.add_argument("--check", action="store_true", help="check the recipe and stop")
    parser.add_argument("--explain", action="store_true", help="say what it would do and cost, and stop")
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="with --check or --explain: import, which runs it, the code that the recipe names as package.module:name",
    )
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_intermixed_args(words)
    if options.allow_code and not (options.check or options.explain):
        parser.error("--allow-code: goes with --check or --explain; a run imports what its recipe names.")
    if options.check and (other := "--explain" if options.explain else "--fresh" if options.fresh else None):
        parser.error(f"--check stops before anything is done, so {other} has no part in it. Give one of them.")
    if options.explain and options.fresh:
        parser.error("--explain stops before anything is done, so --fresh has no part in it. Give one of them.")
    again = "the same command" + (" without --fresh" if options.fresh else "")
    goes_on = "" if options.check or options.explain else f"; {again} goes on from the last whole round"
    heed_ctrl_c()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        raws = raw_recipes(options.recipe, options.overrides)
        if not (options.check or options.explain):
            refuse_lost_names(raws, options.only)
        code = [] if options.allow_code or not (options.check or options.explain) else outside_code(raws)
        if code and options.explain:
            raise RecipeError(
                f"--explain: the recipe names code, which would be run to explain it: {', '.join(code)}. If you trust "
                "it, add --allow-code; --check does without."
            )
        noted: list[str] = []
        gone = [problem for raw in raws.values() for problem in places.lost(raw, noted)] if options.check else []
        plans = planned_all(raws, not code, gone)
        among = list(plans)
        if options.only is not None:
            plans = chosen(plans, options.only)
        if options.check:
            print(f"{options.recipe}: fine ({len(plans)} run{'s' if len(plans) > 1 else ''}).")
            for note in dict.fromkeys([*noted, *(note for plan in plans.values() for note in plan.notes())]):
                print(f"note: {note}")
            if code:
                print(
                    f"note: not looked at, because to import code is to run it: {', '.join(code)}, nor the block that "
                    "it stands in beyond names and settings. If you trust it, add --allow-code."
                )
            return 0
        if options.explain:
            from fedllm_sec.build.explain import explain

            quiet()
            text, problems = explain(plans)
            print(text)
            if problems:
                raise RecipeError([f"the run would not begin: {problem}" for problem in problems])
            return 0
        run_all(plans, typed("train", words), among, fresh=options.fresh)
        return _came_to(plans.values())
    except BrokenPipeError:
        raise  # nobody reads on
    except Terminated:
        print(f"terminated{goes_on}.", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"stopped{goes_on}.", file=sys.stderr)
        return 130
    except BaseException as error:  # code that a recipe names may end the program, too: sys.exit(0)
        if (said := in_words(error, again)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it."""


def terminate(*_: object) -> None:
    """A handler of SIGTERM, for all commands that run something."""
    raise Terminated


def _came_to(plans: Iterable[Plan]) -> int:
    """1, and on stderr why, where a run learnt nothing, or diverged though nobody attacked it; else 0."""
    failed = 0
    for plan in plans:
        folder = Path(plan.recipe.output.folder)
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if found["rounds"] == found["skipped_rounds"] > 0:
            failed = 1
            print(f"error: every round was skipped in {folder}: nothing was learnt.", file=sys.stderr)
        elif (since := found.get("diverged")) is not None and not plan.recipe.attacked:
            failed = 1
            lost = f"error: the held-out loss is not finite since round {since} in {folder}: the model is of no use."
            print(f"{lost} Lower algorithm.server_lr or clients.lr.", file=sys.stderr)
    return failed


def heed_ctrl_c() -> None:
    """A shell starts background jobs with SIGINT ignored: `kill -INT` and Ctrl-C are to stop those as well."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


OF_ANOTHER_RANK = ("gloo/transport/", "onnection closed by peer", "onnection reset")
INSTALLED = ("site-packages", "dist-packages")
IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError)


def in_words(error: BaseException, again: str = "the same command") -> str | None:
    """What the user, the disk, the memory or another process is to blame for; None: a fault of this program."""
    if isinstance(error, FedError):
        return str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        what = f"{error.strerror or text}" + (f" ({error.filename})" if error.filename else "")
        if isinstance(error, IN_THE_WAY) or error.errno == errno.ENAMETOOLONG:
            return f"{what}. Something else lies there, or no folder can: choose another output.folder."
    elif kinds & {"MemoryError", "OutOfMemoryError"} or "not enough memory" in text or "t allocate memory" in text:
        what = f"not enough memory ({text[:200] or 'none is left'}); lower clients.batch_size or evaluate.batch_size"
    elif "SafetensorError" in kinds:
        what = f"a file of tensors cannot be read or written ({text[:200]})"
    elif kinds & {"DistBackendError", "DistError"} or any(sign in text for sign in OF_ANOTHER_RANK):
        told = re.sub(r"^\[[^]]*gloo/[^]]*\] ", "", text).partition(". This is typically")[0]
        what = f"another process of this run has ended, or does not answer ({told[:200]})"
    elif (found := outside_code_of(error)) is not None:
        place, library = found
        whose = "in a library that the recipe's model or methods run in" if library else "which the recipe names"
        way_out = "Change what is asked of it" if library else "Mend it"
        return f"{place}, {whose}: {type(error).__name__}: {text[:300]}. {way_out}; {again} then goes on."
    else:
        return None
    return f"{what}. What was written is whole: {again} goes on from there."


def outside_code_of(error: BaseException) -> tuple[str, bool] | None:
    """The place in code that is not this program's where it raised the error, and whether all such code is installed.

    The last place that is not installed, where there is one: a user's model that a library calls. None elsewhere.
    """
    from fedllm_sec.build.rehearsal import outside_frames, place_of

    frames = outside_frames(error)
    own = [frame for frame in frames if not any(folder in frame.filename for folder in INSTALLED)]
    return (place_of((own or frames)[-1]), not own) if frames else None


# ---------------------------------------------------------------- file -> raw -> checked recipe -> plan


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Plan]:
    """The runs a recipe asks for, by variant name ("" where it is one run); all mistakes at once."""
    return planned_all(raw_recipes(path, overrides))


def raw_recipes(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The unchecked recipe of each variant ("" where there are none), its folder among the others'."""
    path = shipped.find(path)
    raw = reading.read(path, overrides)
    if "axes" in raw:
        raise RecipeError(f"{path}: is a grid. Run it with python -m fedllm_sec.benchmark {path}.")
    output = raw.setdefault("output", {})
    if isinstance(output, dict) and isinstance(folder := output.get("folder", "runs/{name}"), str):
        output["folder"] = folder.replace("{name}", path.stem)
    changes = reading.variants(raw.pop("variants", None))
    return {name: reading.merge(raw, change) for name, change in changes.items()}


def refuse_lost_names(raws: Mapping[str, dict[str, Any]], only: Sequence[str] | None) -> None:
    """Raise where a model or data that will be read are nowhere: before torch is imported, which takes seconds."""
    chosen = [raw for name, raw in raws.items() if only is None or name in only]
    if lost := list(dict.fromkeys(problem for raw in chosen for problem in places.lost(raw))):
        raise RecipeError(lost)


def outside_code(raws: Mapping[str, dict[str, Any]]) -> list[str]:
    """`place package.module:name` of what the variants name from outside."""
    from fedllm_sec.build.names import outside

    return list(dict.fromkeys(f"{where} {name}" for raw in raws.values() for where, name in outside(raw)))


def planned_all(
    raws: Mapping[str, dict[str, Any]], allow_code: bool = True, also: Iterable[str] = ()
) -> dict[str, Plan]:
    """The plan of each variant; all mistakes at once, `also` those. Without `allow_code` no outside code is in it."""
    from fedllm_sec.build.names import checked, without_code
    from fedllm_sec.build.plan import planned

    found: dict[str, Plan] = {}
    problems = dict[str, None].fromkeys(also)
    for name, raw in raws.items():
        try:
            recipe = checked(raw, allow_code)
            if name:
                folder = f"{recipe.output.folder}/{name}"
                recipe = recipe.model_copy(update={"output": recipe.output.model_copy(update={"folder": folder})})
            found[name] = planned(recipe if allow_code else without_code(recipe))
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

OLD = 3600.0  # seconds after which an unfinished file in a folder of many runs is no other process's work any more


def run_all(plans: dict[str, Plan], command: str, among: Sequence[str] = (), fresh: bool = False) -> Path:
    """Run every variant, then write one report; gives the folder.

    `among` are all variants of the recipe: the report is also about those that an earlier command ran. `fresh`: the
    runs' folders are first given new names, once all of them are known to begin.
    """
    from fedllm_sec.build.federation import assemble
    from fedllm_sec.build.loaded import Loaded
    from fedllm_sec.build.running import make_machine, run_one

    quiet()
    first = next(iter(plans.values())).recipe
    folder = Path(first.output.folder).parent if "" not in plans else Path(first.output.folder)
    beside = Path(first.output.folder) if "" in (among or plans) else Path(first.output.folder).parent
    machine, loaded = make_machine(first, folder), Loaded()
    old = [plan for plan in plans.values() if fresh and Path(plan.recipe.output.folder).exists()]
    machine.accelerator.wait_for_everyone()  # all have looked before one writes
    if machine.main:
        places.need_folder(folder)
        remove_leftovers(folder, OLD)
    for plan in old:
        assemble(plan, machine, loaded)  # what data or model forbid is an error before a folder gets another name
    for plan in old if machine.main else ():
        if (aside := RunFolder(Path(plan.recipe.output.folder)).set_aside()) is not None:
            print(f"{plan.recipe.output.folder}: the old folder is now {aside}", flush=True)
    machine.accelerator.wait_for_everyone()
    for name, plan in plans.items():
        if machine.main and name:
            print(f"\n{name}: {plan.recipe.output.folder}", flush=True)
        run_one(plan, machine, command, loaded, beside=beside)
    if machine.main:
        from fedllm_sec.report.page import terminal_summary, write_report

        if "" not in plans:
            there = [name for name in among or plans if name in plans or (folder / name / "history.jsonl").is_file()]
            write_json(folder / "comparison.json", {"variants": there, "command": command})
        print("\n" + terminal_summary(folder))
        print(f"\nreport: {write_report(folder)}")
    machine.accelerator.end_training()
    return folder


def quiet() -> None:
    """One line a round is what people should see: no bars over maps and weight loading, no notes between libraries."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    sys.exit(main())
