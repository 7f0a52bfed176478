"""`fedllm-sec aggregate`: one peft adapter folder of several, by a rule. Only safetensors are read; no code is run."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedllm_sec.api.rows import aggregate
from fedllm_sec.api.states import Merged, aggregate_state_dicts
from fedllm_sec.errors import DefenseError, FedError, Parser, quietly, reason
from fedllm_sec.models.saving import CLASSES, classes_of
from fedllm_sec.recipe import plainyaml
from fedllm_sec.records.files import in_a_line, write_atomic

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# keys of a configuration that say nothing of what the factors mean; all others must agree
IDLE = {"inference_mode", "peft_version", "auto_mapping", "runtime_config", "lora_dropout", "revision"}
UNLIKE = 0.5  # A factors whose mean cosine is below this did not start as one


def read_config(folder: Path) -> dict[str, Any]:
    """What of an adapter's configuration its factors depend on."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DefenseError(f"{path}: cannot be read ({reason(error)}). Give a peft adapter folder.") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise DefenseError(f"{path}: is no LoRA adapter's configuration (peft_type). Give a LoRA adapter folder.")
    told = {str(key): value for key, value in found.items() if key not in IDLE}
    for key, value in told.items():
        if isinstance(value, list):
            told[key] = sorted(map(str, value))
    return told


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter."""
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise DefenseError(f"{path}: no such file. Save the adapter as safetensors; pickles are not read.")
    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as error:  # anybody may have written it: the library raises its own kind, and others
        raise DefenseError(f"{path}: cannot be read ({reason(error)}). Save it again, or leave it out.") from error
    if not found:
        raise DefenseError(f"{path}: holds no tensors. Save the adapter again, or leave it out.")
    return found


def merged(folders: Sequence[Path], start: Path | None, name: str, settings: Mapping[str, Any]) -> Merged:
    """The rule on the adapters' differences to `start`, or on the adapters themselves where it is None.

    A and B are aggregated apart: the product of their means is not the mean of their products.
    """
    known: dict[str, Path] = {}
    for folder in folders:
        if (place := os.path.realpath(folder)) in known:
            raise DefenseError(
                f"{folder}: is {known[place]} once more, and would have two votes. Give each adapter once."
            )
        known[place] = folder
    configs = {folder: read_config(folder) for folder in ([start] if start else []) + list(folders)}
    first, wanted = next(iter(configs.items()))
    for folder, config in configs.items():
        if odd := sorted(key for key in {*config, *wanted} if config.get(key) != wanted.get(key)):
            raise DefenseError(
                f"{folder / CONFIG}: {in_a_line(odd[0])}: {in_a_line(config.get(odd[0]))}, in {first} it is "
                f"{in_a_line(wanted.get(odd[0]))}: their factors mean different things. Leave one out."
            )
    states = [read_weights(folder) for folder in folders]
    begun = read_weights(start) if start is not None else None  # before anything else is asked of its file
    classes = {folder: classes_of(folder / WEIGHTS) for folder in ([start] if start else []) + list(folders)}
    told = {folder: names for folder, names in classes.items() if names is not None}
    if len(set(told.values())) > 1:
        (one, its), (other, others) = list({names: (folder, names) for folder, names in told.items()}.values())[:2]
        raise DefenseError(
            f"{other / WEIGHTS}: tells {in_a_line(', '.join(others))} apart, in this order; {one} "
            f"{in_a_line(', '.join(its))}: their outputs mean different classes. Leave one out."
        )
    begun = begun if begun is not None else _zeros(states)
    if start is None and (alike := likeness(states)) < UNLIKE:
        warnings.warn(
            f"aggregate: the A factors of these adapters have a mean cosine of {alike:.2f}: they did not start from "
            "one adapter, so that means and medians of their factors say little. Give adapters of one federation.",
            stacklevel=2,
        )
    return aggregate_state_dicts(states, begun, name, ids=[str(folder) for folder in folders], **settings)


def _zeros(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Zeros with the names, shapes and dtypes that more than half of the adapters have."""

    def shape(state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        return tuple(sorted((key, tuple(value.shape), str(value.dtype)) for key, value in state.items()))

    known = [shape(state) for state in states]
    usual = max(known, key=known.count)
    if 2 * known.count(usual) <= len(known):
        raise DefenseError(
            "aggregate: no more than half of the adapters have tensors of the same names, shapes and dtypes, so nobody "
            "can say which of them are the odd ones. Leave those out, or give --start."
        )
    return {key: torch.zeros_like(value) for key, value in states[known.index(usual)].items()}


def likeness(states: Sequence[Mapping[str, Tensor]]) -> float:
    """The mean cosine of the A factors of each pair of adapters; nan where they have none."""
    factors = [
        torch.cat([v.double().flatten() for k, v in s.items() if "lora_A" in k] or [torch.zeros(0)]) for s in states
    ]
    if len({len(f) for f in factors}) != 1 or not len(factors[0]) or len(factors) < 2:
        return math.nan
    rows = torch.nn.functional.normalize(torch.stack(factors), dim=1)
    n = len(rows)
    return float(((rows @ rows.T).sum() - n) / (n * (n - 1)))


def save(made: Merged, folders: Sequence[Path], out: Path, said: str) -> None:
    """The adapter as a folder: weights, a card, the configuration, and the tokenizer files that most of those have.

    What is copied comes of adapters that were taken; a file in which they differ is left out unless more than half of
    them have the same.
    """
    from safetensors.torch import save as as_bytes

    taken = [folder for folder in folders if str(folder) not in made.refused]
    out.mkdir(parents=True)
    shutil.copyfile(taken[0] / CONFIG, out / CONFIG)
    for name in BESIDE:
        there = [(folder / name).read_bytes() for folder in taken if (folder / name).is_file()]
        usual = max(there, key=there.count, default=None)
        if usual is not None and 2 * there.count(usual) > len(taken):
            write_atomic(out / name, usual)
    told = [names for names in (classes_of(folder / WEIGHTS) for folder in taken) if names is not None]
    named = {CLASSES: json.dumps(list(told[0]))} if told else {}
    tensors = {key: value.contiguous() for key, value in made.state.items()}
    write_atomic(out / WEIGHTS, as_bytes(tensors, metadata={"format": "pt", **named}))
    write_atomic(out / CARD, f"---\nlibrary_name: peft\n---\n\n# An adapter of several\n\n{said}\n".encode())


def _path(word: str) -> Path:
    return Path(os.path.expanduser(word))


# what the call behind the command is given besides a rule's settings
CALL = {name for call in (aggregate_state_dicts, aggregate) for name in inspect.signature(call).parameters} - {
    "settings"
}


def _settings(words: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise DefenseError(f"--set {word}: must be NAME=VALUE, as f=2.")
        if key in CALL:
            way = "Give it as --before." if key == "before" else "Leave it out."
            raise DefenseError(f"--set {word}: {key} is no setting of a rule. {way}")
        if key in found:
            raise DefenseError(f"--set {word}: {key} was set to {in_a_line(found[key])} before it. Give one of them.")
        found[key] = plainyaml.parse(value, f"--set {key}")
    return found


def _stages(words: Sequence[str]) -> list[Any]:
    """Stages as `aggregate` takes them: names, or blocks as in a recipe."""
    found: list[Any] = []
    for word in words:
        stage = plainyaml.parse(word, "--before") if word.lstrip()[:1] in ("{", "[") else word
        found += stage if isinstance(stage, list) else [stage]
    for stage in found:
        name = stage.get("name") if isinstance(stage, dict) else stage
        if not isinstance(name, str) or ":" in name:
            raise DefenseError(
                f"--before {in_a_line(stage)}: must be a name of the menu, or a block as in a recipe: "
                "'{name: nnm, f: 1}'."
            )
    return found


TOLD = (  # what a message calls by the words of a call or a recipe -> the words of this command
    (r"\baggregate\.name:", "--rule:"),
    (r"\baggregate\.(\w+):", r"--set \1:"),
    (r"\bbefore\[(\d+)\]", r"--before.\1"),
    (r"raise clients\.per_round", "give more adapters"),
    (r"Set [^.]*\bdefense\.root_rows\b[^.]*\.", "This command has no clean rows of a server: choose another rule."),
)


def in_options(text: str) -> str:
    """An error's text with the options of this command where it names settings of a call or keys of a recipe."""
    for words, option in TOLD:
        text = re.sub(words, option, text)
    return text


def report(folders: Sequence[Path], made: Merged, rule: str) -> list[str]:
    """What became of each adapter, a line for each."""
    lines, decision = [f"{rule} of {len(folders)} adapters"], made.decision
    for i, folder in enumerate(folders):
        facts = [] if decision.weights is None else [f"weight {float(decision.weights[i]):.3f}"]
        if decision.scores is not None:
            facts.append(f"score {float(decision.scores[i]):.4g}")
        if str(folder) in made.refused:
            facts = [f"set aside: {in_a_line(made.refused[str(folder)])}"]
        lines.append(f"- {folder}: {', '.join(facts) or 'taken part'}")
    return lines


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = Parser(
        prog="fedllm-sec aggregate",
        description="One peft adapter folder of several, by a rule of the menu.",
        epilog="example: fedllm-sec aggregate runs/*/adapter --rule multi_krum --set f=1 --out merged",
    )
    parser.add_argument(
        "folders", nargs="+", type=_path, metavar="ADAPTER", help="folders with adapter_model.safetensors"
    )
    parser.add_argument("--rule", required=True, help="as in a recipe: mean, median, multi_krum, ...")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the rule")
    parser.add_argument(
        "--before",
        action="append",
        default=[],
        metavar="STAGE",
        help="a stage before it: norm_clipping, '{name: nnm, f: 1}'",
    )
    parser.add_argument("--start", type=_path, help="the adapter that all of them were trained from")
    parser.add_argument("--out", required=True, type=_path, help="the folder to make; it must not exist")
    given = parser.parse_args(argv)
    if given.out.exists():
        parser.error(f"--out {given.out}: exists already. Name a new folder.")
    if ":" in given.rule:
        parser.error(f"--rule {given.rule}: must be a name of the menu.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="aggregate_state_dicts: not taken")  # it stands in the lines
        try:
            made = merged(
                given.folders, given.start, given.rule, {**_settings(given.set), "before": _stages(given.before)}
            )
        except FedError as error:
            parser.error(in_options(str(error)))
    lines = report(given.folders, made, given.rule)
    new = next((path for path in reversed(given.out.parents) if not path.exists()), None)
    try:
        save(made, given.folders, given.out, "\n".join(lines))
    except OSError as error:
        parser.error(f"--out {given.out}: cannot be written ({reason(error)}). Name another folder.")
    print("\n".join([*lines, f"written: {given.out}" + (f" (the folder {new} is new)" if new is not None else "")]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
