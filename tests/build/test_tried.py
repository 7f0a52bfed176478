"""A stranger's classifier is tried on two images before anything starts: each fault is one line, and nothing stays."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import GradientState
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from fedllm_sec.build.federation import build
from fedllm_sec.build.names import checked, need_buffers
from fedllm_sec.build.running import make_machine
from fedllm_sec.build.tried import tried
from fedllm_sec.errors import FedError, RecipeError
from fedllm_sec.models import MENU, pretrained
from fedllm_sec.models.statistics import tracking
from fedllm_sec.protocols import Labelled
from fedllm_sec.recipe.resolve import resolve, settings_of
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.rounds.federation import run
from fedllm_sec.tasks.classify import Classify
from fedllm_sec.train import load, run_all

ROWS = Labelled(torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0]), 3, torch.zeros(4, dtype=torch.bool))


class Net(nn.Module):
    """A linear layer; what becomes of its logits is the case."""

    def __init__(self, then: Callable[[Net, Tensor], object] = lambda _, logits: logits, outputs: int = 3) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(16, outputs), then
        self.register_buffer("asked", torch.zeros(1))

    def forward(self, x: Tensor) -> object:
        return self.then(self, self.linear(x.flatten(1)))


def counting(model: Net, logits: Tensor) -> Tensor:
    model.asked += 1
    return logits


GOOD = {
    "a tuple": lambda _, logits: (logits, None),
    "an output of transformers": lambda _, logits: SimpleNamespace(logits=logits),
}
BAD = {
    r"gives dict; must give logits": lambda _, logits: {"out": logits},
    r"its logits of two images are not finite": lambda _, logits: logits / 0,
    r"an image alone scores .* apart": lambda _, logits: logits - logits.mean(0),
    r"gives probabilities \(each row's 3 values sum to 1\)": lambda _, logits: logits.softmax(-1),
    r"its buffer asked changes in evaluation": counting,
    r"the gradient of the loss on two images is 0": lambda _, logits: logits * 0,
    r"logits through which no gradient comes": lambda _, logits: logits.detach(),
    r"fails in evaluation on images of shape \(2, 1, 4, 4\) \(RuntimeError: shape ": lambda _, said: said.view(7, 7),
    r"fails in evaluation on one image alone, of shape \(1, 1, 4, 4\) \(ValueError: inv": (
        lambda _, logits: logits if len(logits) > 1 else int("no")
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_logits_may_come_in_any_usual_form(kind: str):
    task = Classify(Net(GOOD[kind]), torch.device("cpu"))
    tried(task, ROWS, "stranger")
    assert task.loss(ROWS, [0, 1]).isfinite()
    assert task.score(ROWS, [0, 1, 2]).shape == (3, 2)


@pytest.mark.parametrize("words", BAD)
def test_each_fault_is_named_with_the_model(words: str):
    with pytest.raises(FedError, match=words):
        tried(Classify(Net(BAD[words]), torch.device("cpu")), ROWS, "stranger")


def test_a_model_with_other_outputs_than_there_are_classes_is_refused():
    with pytest.raises(RecipeError, match=r"model\.name: stranger: gives \(2, 5\) for two images, must be \(2, 3\)"):
        tried(Classify(Net(outputs=5), torch.device("cpu")), ROWS, "stranger")


@pytest.mark.parametrize("mode", ["average", "local", "batch"])
def test_nothing_is_changed_by_trying(mode):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    task = Classify(model, torch.device("cpu"), buffers=mode)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    tried(task, ROWS, "stranger")
    assert model.training
    assert torch.equal(random, torch.random.get_rng_state())
    assert not task.parameters.grad.any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def lazy(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.LazyLinear(classes)


def frozen(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Linear(4, classes).requires_grad_(False)


def unshaped(classes: int) -> nn.Module:
    return nn.Linear(4, classes)


def scripted(shape: tuple[int, ...], classes: int) -> nn.Module:
    return torch.jit.script(nn.Linear(4, classes))


def unmade(shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Linear(4, classes, device="meta")


def stranger(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A BatchNorm network in ten lines."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


RECIPE = {
    "task": "classify", "rounds": 2, "data": {"name": "digits", "train_rows": 200, "test_rows": 60},
    "clients": {"total": 4, "local_steps": 2, "batch_size": 8, "optimizer": "sgd", "momentum": 0.9, "lr": 0.05},
    "attack": {"malicious": {"count": 1}, "data": [{"name": "pixel_trigger", "target": 0}],
               "update": [{"name": "bn_statistics", "variance": -1.0}]},
    "defense": {"rule": {"name": "median"}}, "compute": {"threads": 1},
    "variants": {"free": {}, "attacked": {"enable_attack": True},
                 "defended": {"enable_attack": True, "enable_defense": True}},
}  # fmt: skip


def test_a_strangers_network_and_a_folders_run_free_attacked_and_defended(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained("resnet")
    for model in ({"name": "tests.build.test_tried:stranger"}, {"name": "./resnet"}):
        made = {**RECIPE, "model": model, "output": {"folder": f"runs/{model['name'][-6:]}"}}
        Path("r.yaml").write_text(yaml.safe_dump(made))
        folder = run_all(load("r.yaml"), "test")
        assert (folder / "report.html").exists()
        screened = [json.loads(line)["buffers_refused"] for line in (folder / "attacked/history.jsonl").open()]
        assert all(len(refused) == 1 for refused in screened)  # the attacker: no variance is negative
    refused = {lazy: "has lazy layers", frozen: "has no parameter to be trained"}
    refused |= {scripted: r"is compiled by torch\.jit", unmade: "is on the meta device"}
    refused |= {Net: "is a class of models, not a function", unshaped: r"cannot be called with \(shape, classes\)"}
    for model, words in refused.items():
        made = {
            **RECIPE,
            "model": {"name": f"tests.build.test_tried:{model.__name__}"},
            "output": {"folder": "runs/no"},
        }
        Path("r.yaml").write_text(yaml.safe_dump(made))
        with pytest.raises(RecipeError, match=words):
            run_all(load("r.yaml"), "test")


def narrow(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Maps of 1 x 1, over which BatchNorm cannot normalise a batch of one image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))


ONE_ROW = {
    "task": "classify", "rounds": 1, "model": {"name": "tests.build.test_tried:narrow"},
    "data": {"name": "digits", "train_rows": 60, "test_rows": 21}, "evaluate": {"batch_size": 10},
    "clients": {"total": 3, "local_steps": 1, "batch_size": 8}, "compute": {"threads": 1},
}  # fmt: skip


def squeezing(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A habit of beginners: it also drops the axis of a batch of one image."""

    class Squeezing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.squeeze().flatten(1) if self.training else x.flatten(1))

    return Squeezing(64, classes)


def clients(total: int = 3, batch_size: int = 8) -> dict[str, object]:
    return {"total": total, "local_steps": 1, "batch_size": batch_size}


BY_BATCH = {"name": "tests.build.test_tried:narrow", "buffers": "batch"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clients": clients(batch_size=1)}, r"clients\.batch_size: 1: a batch has one row, which model tests.*Expected"
         r" more than 1 value per channel.* Raise it to 2 or more, or choose a model with GroupNorm"),
        ({"clients": clients(60)}, r"client c00, c01, .* has one row \(60 such\).*Deal more rows"),
        ({"enable_defense": True, "defense": {"rule": {"name": "fltrust"}, "root_rows": 1}}, "client server has one"),
        ({"clients": clients(batch_size=4), "compute": {"gradient_accumulation": 3}},
         r"clients\.batch_size: 4: a part of a batch has one row \(client c00\).*gradient_accumulation"),
        ({"model": {"name": "tests.build.test_tried:squeezing"}, "clients": clients(batch_size=19)}, "part of a batch"),
        ({"task": "nas", "clients": clients(batch_size=2)}, r"clients\.batch_size: 2: a part of a batch has one row"),
        ({"model": BY_BATCH, "evaluate": {"batch_size": 1}}, r"model\.buffers: batch: evaluate\.batch_size is 1"),
        ({"model": BY_BATCH, "data": {"name": "digits", "train_rows": 60, "test_rows": 1}}, "there is 1 held-out row"),
    ],
)  # fmt: skip
def test_a_batch_of_one_row_that_a_model_cannot_take_is_said_before_training(change, words):
    recipe = checked({**ONE_ROW, **change})
    try:
        with pytest.raises(RecipeError, match=words):
            build(recipe, make_machine(recipe, Path()))
    finally:
        GradientState._reset_state()


def test_a_whole_shard_is_a_batch_of_more_than_one_row_whatever_the_batch_size():
    sgd = {**clients(batch_size=1), "optimizer": "sgd", "max_grad_norm": None}
    build(checked({**ONE_ROW, "clients": sgd, "algorithm": {"name": "fedsgd"}}), Machine(Accelerator(cpu=True)))


def test_a_last_batch_of_one_row_joins_the_one_before_it_and_this_is_told():
    with pytest.warns(UserWarning, match=r"last batch of 3 of 3 shards \(c00, c01, c02\) has one row.*it joins"):
        build(checked({**ONE_ROW, "clients": clients(batch_size=19)}), Machine(Accelerator(cpu=True)))


def test_a_last_batch_of_one_row_joins_the_one_before_it_in_evaluation_too():
    raw = {**ONE_ROW, "model": {"name": "tests.build.test_tried:narrow", "buffers": "batch"}}  # 21 rows by 10
    (record,) = run(build(checked(raw), Machine(Accelerator(cpu=True))), 1)
    assert record.quality["accuracy"]["n"] == 21


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"name": "resnet", "norm": "batch", "buffers": "avreage"}, 'Did you mean "average"?'),
        ({"name": "resnet", "buffers": "average"}, "resnet keeps no running statistics"),
        ({"name": "lenet", "buffers": "local"}, "lenet keeps no running statistics"),
        ({"name": "tests.build.test_tried:stranger", "buffers": ["local"]}, "model.buffers: ['local']: must be one of"),
    ],
)
def test_buffers_that_cannot_travel_are_said_by_check(model, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        checked({**ONE_ROW, "model": model})


def test_buffers_are_for_classifiers():
    gan = {"task": "gan", "rounds": 1, "clients": clients(), "model": {"name": "mlp_gan", "buffers": "batch"}}
    with pytest.raises(RecipeError, match="acts where task is classify or nas, not gan"):
        checked(gan)


@pytest.mark.parametrize("name", [name for name, entry in MENU.items() if entry.kind in ("classify", "nas")])
def test_what_check_says_of_buffers_is_so_of_every_model_of_the_menu(name: str):
    if name == pretrained.NAME:
        pytest.skip("its folder says which layers it has")
    for norm in ({}, {"norm": "batch"}) if "norm" in settings_of(MENU[name].make) else ({},):
        with torch.device("meta"):
            keeps = bool(tracking(resolve(name, norm, MENU, "model")((3, 32, 32), 10)))
        try:
            need_buffers({"name": name, "buffers": "average", **norm}, True, (MENU[name].kind,))
        except RecipeError:
            assert not keeps
        else:
            assert keeps


class Remembering(Net):
    """What it holds beside its parameters is changed in training in this way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("loose", torch.zeros(1), persistent=False)
        self.register_buffer("mask", torch.tensor([False]))

    def forward(self, x: Tensor) -> object:
        logits = self.linear(x.flatten(1))
        if self.training and self.how == "replaced":
            self.asked = self.asked + 1
        if self.training and self.how == "not persistent":
            self.loose += 1
        if self.training and self.how == "a mask":
            self.mask.logical_not_()
        if self.training and self.how == "a graph":
            logits = logits + getattr(self, "last", 0.0)
            self.last = logits.mean(0)
        if self.how == "always on":
            logits = nn.functional.dropout(logits, 0.5)
        return logits if self.how != "a mask inverted" else logits * ~self.mask


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("replaced", r"puts another tensor in the place of its buffer asked, .* self\.asked\.copy_"),
        ("not persistent", r"changes its buffer loose, which no state dict has"),
        ("a mask", r"changes its buffer mask, which is a mask"),
        ("a graph", r"fails in a second step of training \(RuntimeError: Trying to backward"),
        ("always on", r"the same images score .* apart from call to call"),
    ],
)
def test_what_one_client_would_leave_to_the_next_is_refused(how: str, words: str):
    with pytest.raises(RecipeError, match=words):
        tried(Classify(Remembering(how), torch.device("cpu")), ROWS, "stranger")


def test_masks_stay_masks():
    model = Remembering("a mask inverted")
    bare = model(ROWS.x)
    task = Classify(model, torch.device("cpu"))
    tried(task, ROWS, "stranger")
    assert model.mask.dtype == torch.bool
    assert torch.equal(task.model(ROWS.x), bare)


def test_batchnorm_without_running_statistics_runs_as_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    maps = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(RecipeError, match=r"set model\.buffers: batch"):
        tried(Classify(maps, torch.device("cpu")), ROWS, "stranger")
    tried(Classify(model, torch.device("cpu"), buffers="batch"), ROWS, "stranger")


def resnet18(*, weights: object | None = None, progress: bool = True, **kwargs: object) -> torch.nn.Module:
    """As torchvision.models has it: told how many classes there are, and no shape."""
    if weights is not None and kwargs["num_classes"] != 1000:
        raise ValueError(f"The parameter 'num_classes' expected value 1000 but got {kwargs['num_classes']} instead")
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, int(str(kwargs.pop("num_classes"))), bias=bool(kwargs.pop("bias", True))),
    )


def test_a_model_of_torchvision_is_told_the_classes_of_the_data(monkeypatch, tmp_path):
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["torchvision.models"], "resnet18", resnet18, raising=False)
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    y = np.arange(40) % 5
    np.savez(tmp_path / "five.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    raw = {
        "rounds": 1,
        "task": "classify",
        "model": {"name": "torchvision.models:resnet18"},
        "data": {"name": str(tmp_path / "five.npz")},
        "clients": {"total": 2, "local_steps": 1, "batch_size": 4, "partition": {"name": "iid"}},
    }
    made = build(checked(raw), Machine(Accelerator(cpu=True)))
    assert tuple(made.task.model[5].weight.shape) == (5, 4)
    (record,) = run(made, 1)
    assert 0 <= record.quality["accuracy"]["value"] <= 1
    assert made.buffers is not None  # its BatchNorm's statistics travel
    with pytest.raises(RecipeError, match=r"torchvision\.models:resnet18.*expected value 1000 but got 5 instead"):
        build(checked({**raw, "model": {**raw["model"], "weights": "DEFAULT"}}), Machine(Accelerator(cpu=True)))
