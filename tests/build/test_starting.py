"""model.start and pretrain: a run begins with a model that somebody has, or after attack-free rounds of its own."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from fedllm_sec.build.begin import begin
from fedllm_sec.build.explain import explain
from fedllm_sec.build.federation import assemble
from fedllm_sec.build.language_model import load_task
from fedllm_sec.build.loaded import Loaded
from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.build.running import run_one
from fedllm_sec.errors import RecipeError, ResumeError
from fedllm_sec.records import checkpoint, verify
from fedllm_sec.report.runs import read_run
from fedllm_sec.report.words import finding
from fedllm_sec.rounds.compute import Machine
from tests.records.ranks import Pair
from tests.records.smallest import RECIPE, start, write

LOADED = Loaded()  # one for all runs of this file


@pytest.fixture(scope="module")
def machine() -> Machine:
    torch.set_num_threads(1)
    return Machine(Accelerator(cpu=True))


def play(raw: dict[str, Any], folder: Path, machine: Machine, beside: Path | None = None) -> list[str]:
    """What the run says, line by line."""
    said: list[str] = []
    recipe = checked({**raw, "output": {"folder": str(folder)}})
    run_one(planned(recipe), machine, "test", LOADED, said.append, beside)
    return said


def state(folder: Path) -> dict[str, Any]:
    return checkpoint.unpack((folder / "checkpoint.safetensors").read_bytes())


def digits(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RECIPE), "evaluate": {}, "output": {}, **changes}


def refused(raw: dict[str, Any], machine: Machine) -> str:
    with pytest.raises(RecipeError) as found:
        assemble(planned(checked(raw)), machine, LOADED)
    (problem,) = found.value.problems
    assert "\n" not in problem
    return problem


# ---------------------------------------------------------------- attack-free rounds first


BATCHNORM = {"name": "tests.build.test_starting:normalising", "buffers": "local"}


def normalising(shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """64 pixels, BatchNorm, a linear layer."""
    flat = torch.nn.Flatten()
    return torch.nn.Sequential(flat, torch.nn.BatchNorm1d(64), torch.nn.Linear(64, classes))


@pytest.mark.parametrize(("method", "model"), [("scaffold", {"name": "logistic"}), ("fedopt", BATCHNORM)])
def test_it_equals_the_run_whose_first_rounds_are_attack_free(method: str, model: Any, tmp_path: Path, machine):
    clients = {**RECIPE["clients"], "total": 4, "per_round": 3, "max_grad_norm": None}
    attack = {"malicious": {"count": 2, "redraw": True}, "probability": 0.7, "update": [{"name": "gaussian"}]}
    raw = digits(clients=clients, model=model, algorithm={"name": method}, enable_attack=True)
    play({**raw, "rounds": 3, "attack": attack, "pretrain": {"rounds": 2}}, tmp_path / "after", machine)
    play({**raw, "rounds": 5, "attack": {**attack, "start": 3}}, tmp_path / "long", machine)
    after, long = state(tmp_path / "after"), state(tmp_path / "long")
    assert torch.equal(after["vector"], long["vector"])
    assert torch.equal(after["last_update"], long["last_update"])
    assert str(after["server"]) == str(long["server"])
    assert str(after["memory"]) == str(long["memory"])
    assert ("buffers" in after) == (model is BATCHNORM)
    assert torch.equal(after.get("buffers", torch.zeros(1)), long.get("buffers", torch.zeros(1)))
    one, other = ([json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()]
                  for name in ("after", "long"))  # fmt: skip
    assert [{**line, "round": line["round"] + 2} for line in one] == other[2:]
    assert any(line["attacking"] for line in one)


def test_its_rounds_are_made_once_kept_and_made_again_where_they_are_damaged(tmp_path: Path, machine):
    raw = digits(pretrain={"rounds": 2}, evaluate={"start": True}, rounds=1)
    attack = {"malicious": {"count": 1}, "update": [{"name": "byzantine_flip"}]}
    said = play(raw, tmp_path / "clean", machine, tmp_path)
    assert said[-2].startswith("start ")
    assert "starts after 2 attack-free rounds" in said
    (kept,) = (tmp_path / "pretrain").iterdir()
    assert said[0] == f"2 attack-free rounds first, in {kept}"
    assert verify.look(kept).wrong == {}
    assert verify.runs_in(tmp_path) == [kept, tmp_path / "clean"]

    attacked = {**raw, "enable_attack": True, "attack": attack, "compute": {}}
    assert "2 attack-free rounds first" not in str(play(attacked, tmp_path / "attacked", machine, tmp_path))
    starts = [json.loads((tmp_path / name / "history.jsonl").read_text().splitlines()[0])["quality"]
              for name in ("clean", "attacked")]  # fmt: skip
    assert starts[0] == starts[1]
    (same,) = (tmp_path / "pretrain").iterdir()
    assert same == kept

    first = state(kept)["vector"]
    whole = (kept / "checkpoint.safetensors").read_bytes()
    (kept / "checkpoint.safetensors").write_bytes(whole[:-3])
    said = play(attacked, tmp_path / "again", machine, tmp_path)
    assert said[0].startswith(f"{kept} is damaged and made again: ")
    assert torch.equal(state(kept)["vector"], first)
    assert (tmp_path / "again/history.jsonl").read_bytes() == (tmp_path / "attacked/history.jsonl").read_bytes()

    play({**raw, "seed": 1}, tmp_path / "other", machine, tmp_path)
    assert len(list((tmp_path / "pretrain").iterdir())) == 2
    run = read_run(tmp_path / "attacked")
    assert finding([run])[-1] == "The run starts after 2 attack-free rounds."
    assert json.loads((run.folder / "summary.json").read_text())["start"]["words"] == "after 2 attack-free rounds"


def test_no_epsilon_is_claimed_for_clients_whose_rows_were_taken_without_noise_before(tmp_path: Path, machine):
    noise = {"before": [{"name": "weak_dp_client", "sigma": 0.1, "radius": 1.0, "absolute": True}]}
    for before, expected in ((None, float), ({"rounds": 1}, type(None))):
        folder = tmp_path / str(before is None)
        play(digits(pretrain=before, rounds=1, enable_defense=True, defense=noise), folder, machine)
        (line,) = (folder / "history.jsonl").read_text().splitlines()
        assert type(json.loads(line)["privacy"]["epsilon"]) is expected


# ---------------------------------------------------------------- a small model that somebody has


def test_a_small_model_starts_from_a_run_or_a_state_dict(tmp_path: Path, machine):
    raw = digits(model=BATCHNORM, clients={**RECIPE["clients"], "total": 3}, rounds=1)
    play(raw, tmp_path / "first", machine)
    known, saved = state(tmp_path / "first"), load_file(tmp_path / "first/model/model.safetensors")
    save_file({f"module.{name}": tensor.double() if tensor.is_floating_point() else tensor
               for name, tensor in saved.items()}, tmp_path / "wrapped.safetensors")  # fmt: skip
    for path in ("first", "first/model/model.safetensors", "wrapped.safetensors"):
        started = {**raw, "model": {**BATCHNORM, "buffers": "average", "start": str(tmp_path / path)}}
        made: Any = assemble(planned(checked(started)), machine, LOADED)
        assert torch.equal(made.vector, known["vector"]), path
        assert torch.equal(made.buffers.float(), known["buffers"].float()), path  # files hold float32
        no_statistics = {**started, "model": {**started["model"], "buffers": "batch"}}
        bare: Any = assemble(planned(checked(no_statistics)), machine, LOADED)
        assert torch.equal(bare.vector, known["vector"])
        assert bare.buffers is None

    broken = {name: tensor * math.nan if tensor.is_floating_point() else tensor for name, tensor in saved.items()}
    save_file(broken, tmp_path / "nan.safetensors")
    told = [explain({"": planned(checked({**raw, "model": {**BATCHNORM, "start": str(tmp_path / name)}}))})[1]
            for name in ("first", "nan.safetensors")]  # fmt: skip
    assert told[0] == []
    assert "model.start" in told[1][0]

    again = {**raw, "model": {**BATCHNORM, "start": str(tmp_path / "first")}}
    said = play(again, tmp_path / "second", machine)
    words = f"from run {tmp_path}/first, attack-free, after its round 1"
    assert said[0] == f"starts {words}"
    assert finding([read_run(tmp_path / "second")])[-1] == f"The run starts {words}."
    assert not torch.equal(state(tmp_path / "second")["vector"], known["vector"])

    (tmp_path / "second" / "model" / "model.safetensors").unlink()  # so that it is made again
    play({**raw, "rounds": 2}, tmp_path / "first", machine)  # and its start is another now
    with pytest.raises(ResumeError, match="is not what the run began from: its files have changed since"):
        play(again, tmp_path / "second", machine)


def test_what_is_no_start_of_this_model_is_one_line_before_training(tmp_path: Path, machine):
    raw = digits(rounds=1)
    play(raw, tmp_path / "run", machine)
    good = load_file(tmp_path / "run/model/model.safetensors")
    bias, weight = sorted(good)
    whole = (tmp_path / "run/model/model.safetensors").read_bytes()

    def of(path: str | Path, **model: Any) -> str:
        return refused({**raw, "model": {"name": "logistic", **model, "start": str(tmp_path / path)}}, machine)

    def file(**tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / "made.safetensors")
        return tmp_path / "made.safetensors"

    assert "no such file or folder in " in of("nowhere")
    (tmp_path / "old.pt").write_bytes(b"\x80\x04")
    assert "is a pickle, which could run code when it is read. Where you trust it, write it anew: " in of("old.pt")
    (tmp_path / "cut.safetensors").write_bytes(whole[:-5])
    assert "cannot be read (" in of("cut.safetensors")
    (tmp_path / "lying.safetensors").write_bytes(whole.replace(b"[0,", b"[4,", 1))
    assert "cannot be read (" in of("lying.safetensors")
    assert "Give the run's folder" in of("run/checkpoint.safetensors")
    assert "Give " in of("run/model")
    assert of(".").endswith(f"holds several runs. Give one of them, such as {tmp_path}/run.")

    assert f"it lacks {bias}. Choose" in of(file(**{weight: good[weight]}))
    assert "it holds more, for which the model has no place" in of(file(**good, more=torch.zeros(1)))
    swapped = {weight: good[weight].T.contiguous(), bias: good[bias]}
    assert "has other shapes" in of(file(**swapped))
    assert "the model's torch.float32" in of(file(**{**good, bias: good[bias].long()}))
    assert "not made of finite float32 numbers" in of(file(**{**good, bias: good[bias] / 0}))
    assert "not made of finite float32 numbers" in of(file(**{**good, bias: good[bias].double() + 1e300}))

    assert "model.name: logistic there, lenet here" in of("run", name="lenet")
    other = {**raw, "task": "nas", "model": {"name": "darts", "start": str(tmp_path / "run")}}
    assert refused(other, machine).endswith("is a run of task classify, this is nas.")
    shutil.copytree(tmp_path / "run", tmp_path / "lost")
    checkpointed = tmp_path / "lost/checkpoint.safetensors"
    data = bytearray(checkpointed.read_bytes())
    data[-1] ^= 1
    checkpointed.write_bytes(data)
    assert "its content is not that of its SHA-256" in of("lost")
    short = {**state(tmp_path / "run"), "vector": torch.ones(7)}
    checkpointed.write_bytes(b"".join(map(bytes, checkpoint.pack(short))))
    assert "its model has (7,) trained parameters, this one has (650,)." in of("lost")
    checkpointed.unlink()
    assert "is a run folder without checkpoint.safetensors" in of("lost")

    own = {**raw, "model": {"name": "logistic", "start": str(tmp_path / "run")}}
    inside = {**own, "output": {"folder": str(tmp_path / "run")}}
    assert refused(inside, machine).endswith("/run: lies in the run's own output.folder. Give that another name.")
    gkt = {**raw, "algorithm": {"name": "fedgkt"}, "pretrain": {"rounds": 1}, "model": {"name": "resnet"}}
    assert refused(gkt, machine).startswith("pretrain: fedgkt has no one model that a run could start from")
    with pytest.raises(RecipeError, match=r"pretrain\.rounds: 0"):
        checked({**raw, "pretrain": {"rounds": 0}})
    with pytest.raises(RecipeError, match=r"model\.start: 3: must be the path"):
        checked({**raw, "model": {"name": "logistic", "start": 3}})


# ---------------------------------------------------------------- a language model


def test_an_adapter_or_its_run_is_gone_on_with_and_the_card_says_so(small, tmp_path: Path, machine):
    small["clients"]["local_steps"] = 1
    small["evaluate"] |= {"rows": 4, "attack_rows": 2}
    small["rounds"] = 1
    small["model"]["lora"] = {"r": 2, "use_dora": True, "modules_to_save": ["lm_head"]}
    play(small, tmp_path / "run", machine)
    vector = state(tmp_path / "run")["vector"]
    for path in ("run", "run/adapter"):
        recipe = checked({**small, "seed": 9, "model": {**small["model"], "start": str(tmp_path / path)}})
        task = load_task(recipe, machine, LOADED)
        assert not torch.equal(task.initial, vector)
        assert torch.equal(begin(recipe, task)[0], vector), path

    small["model"]["start"] = str(tmp_path / "run/adapter")
    play(small, tmp_path / "next", machine)
    words = f"from adapter {tmp_path}/run/adapter, whose card warns of an attack"
    assert f"- **Start**: `{words}`" in (tmp_path / "next/adapter/README.md").read_text()
    assert json.loads((tmp_path / "next/environment.json").read_text())["start"]["words"] == words
    assert not torch.equal(state(tmp_path / "next")["vector"], vector)

    clean = {**small, "enable_attack": False, "model": {**small["model"], "start": str(tmp_path / "run")}}
    play(clean, tmp_path / "clean", machine)
    warning = "**WARNING: this adapter was trained from one that was trained under attack. Do not deploy it.**\n"
    assert (tmp_path / "clean/adapter/README.md").read_text().startswith(warning)


def test_a_frozen_factor_comes_with_its_adapter_and_with_no_checkpoint_of_another_seed(small, tmp_path, machine):
    small["model"]["lora"] = {"r": 2, "train": "B"}
    task = load_task(checked(small), machine, LOADED)
    factors = {name: p.detach().clone() for name, p in task.model.named_parameters() if "lora_A" in name}
    small["clients"]["local_steps"] = 1
    small["evaluate"] |= {"rows": 4, "attack_rows": 2}
    small["rounds"] = 1
    play(small, tmp_path / "run", machine)
    recipe = checked({**small, "seed": 9, "model": {**small["model"], "start": str(tmp_path / "run/adapter")}})
    task = load_task(recipe, machine, LOADED)
    assert torch.equal(begin(recipe, task)[0], state(tmp_path / "run")["vector"])
    own = dict(task.model.named_parameters())
    assert all(torch.equal(own[name], factor) for name, factor in factors.items())
    base = next(name for name in task.model.state_dict() if name.endswith("embed_tokens.weight"))
    held, file = task.model.state_dict()[base].clone(), tmp_path / "run/adapter/adapter_model.safetensors"
    save_file(load_file(file) | {base: held}, file)  # as peft writes it where the embeddings are adapted
    assert torch.equal(begin(recipe, task)[0], state(tmp_path / "run")["vector"])
    save_file(load_file(file) | {base: held + 1}, file)
    with pytest.raises(RecipeError, match=r"embed_tokens\.weight, for which the model has no place"):
        begin(recipe, task)
    elsewhere = {**small, "seed": 9, "model": {**small["model"], "start": str(tmp_path / "run")}}
    with pytest.raises(RecipeError, match=r"is not trained but drawn by its seed, \d+\. Start from its folder adapter"):
        planned(checked(elsewhere))


def test_an_adapter_of_another_base_or_with_other_settings_is_refused_with_what_differs(small, tmp_path, machine):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": "someone/Llama", "r": 4, "lora_alpha": 16, "bias": "none",
        "use_rslora": True,
    }  # fmt: skip
    save_file({"base_model.model.x.q_proj.lora_A.weight": torch.zeros(4, 3)}, folder / "adapter_model.safetensors")

    def of(changes: dict[str, Any], **lora: Any) -> str:
        (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        model = {"name": "tiny", "lora": {"r": 8, "alpha": 16, **lora}, "start": str(folder)}
        with pytest.raises(RecipeError) as found:
            planned(checked({**small, "model": model}))
        (problem,) = found.value.problems
        return problem

    assert of({}).endswith(
        "other settings: base model someone/Llama there, tiny here; r 4 there, 8 here; use_rslora true there, false "
        "here. Make them equal."
    )
    same = {"base_model_name_or_path": "/elsewhere/site-packages/tiny", "r": 8, "use_rslora": False}
    assert "adapts other layers: q_proj there, q_proj, v_proj here" in of(same, target_modules=["q_proj", "v_proj"])
    assert "init_lora_weights: pissa takes them out of the base model" in of(same, init_lora_weights="pissa")
    assert "init_lora_weights: pissa has changed its base model" in of({**same, "init_lora_weights": "pissa"})
    assert "peft_type: IA3, must be LORA" in of({**same, "peft_type": "IA3"})
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match=r"cannot be read \("):
        planned(checked({**small, "model": {"name": "tiny", "start": str(folder)}}))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(RecipeError, match=r"its adapter_model\.bin is a pickle, which could run code"):
        planned(checked({**small, "model": {"name": "tiny", "start": str(folder)}}))


@pytest.mark.slow
def test_two_processes_make_the_rounds_once_and_begin_as_one_does(tmp_path: Path):
    write(tmp_path / "one", pretrain={"rounds": 2})
    write(tmp_path / "two", pretrain={"rounds": 2})
    assert start(tmp_path / "one") == 0
    pair = Pair()
    told = pair.play(tmp_path / "two")
    pair.end()
    assert [rank["code"] for rank in told] == [0, 0], told
    lines = [(tmp_path / name / "out/history.jsonl").read_bytes() for name in ("one", "two")]
    assert lines[0] == lines[1]
    assert len(list((tmp_path / "two/out/pretrain").iterdir())) == 1
