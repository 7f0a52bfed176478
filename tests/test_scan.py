"""`fedllm-sec scan`: one adapter folder against a bank; what cannot be judged is refused in a line."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedllm_sec.__main__ import main
from fedllm_sec.api.scan import SHIPPED, Bank, weights_hash
from fedllm_sec.defenses.spectrum import statistics
from fedllm_sec.errors import DefenseError
from fedllm_sec.grid.bank import of_features
from fedllm_sec.models.lora import source_of

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
SHAPES = {NAME.format("A"): (2, 3), NAME.format("B"): (4, 2)}


def features(spread: float) -> np.ndarray:
    """Of 20 adapters with singular values near (4, 2) where spread is 0, and (4 + spread, 2) otherwise."""
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, size=(20, 2))
    return np.stack([statistics(torch.tensor([4 + spread + a, 2 + b])).numpy() for a, b in noise])


def bank() -> Bank:
    groups = np.tile(np.arange(20), 2)
    rows, bad = np.concatenate([features(0.0), features(4.0)]), np.repeat([False, True], 20)
    told = {"base": "tiny", "sha256": weights_hash("tiny"), "made_of": "by hand"}
    return of_features(rows, bad, groups, rate=0.05, shapes=SHAPES, **told)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of one layer whose product, times alpha / r = 2, has the singular values 8 and 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": source_of("tiny")}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    write(folder, torch.tensor([[4.0, 0, 0], [0, 1, 0]]))
    (tmp_path / "bank.json").write_text(json.dumps(bank().as_dict()))
    return folder


def write(folder: Path, a: torch.Tensor, **more: torch.Tensor) -> None:
    save_file({NAME.format("A"): a, NAME.format("B"): torch.eye(4, 2), **more}, folder / "adapter_model.safetensors")


def say(folder: Path, capsys, *words: str) -> tuple[int, str, str]:
    status = main(["scan", str(folder), "--bank", str(folder.parent / "bank.json"), *words])
    return status, *capsys.readouterr()


def test_an_adapter_with_a_backdoors_spectrum_is_flagged_and_one_with_a_clean_spectrum_is_not(adapter, capsys):
    status, out, _ = say(adapter, capsys)
    assert status == 1
    assert "likely to be backdoored: flagged" in out
    assert "0 of 20 clean ones were flagged: false-positive rate 0.000 (95 % interval 0.000 to 0.161)" in out
    write(adapter, torch.tensor([[2.0, 0, 0], [0, 1, 0]]))  # 4 and 2
    status, out, _ = say(adapter, capsys)
    assert status == 0
    assert "not flagged" in out
    assert "note:" not in out
    write(adapter, torch.tensor([[900.0, 0, 0], [0, 1, 0]]))
    assert "it was trained otherwise, and the probability says little" in say(adapter, capsys)[1]


def test_an_adapter_that_no_bank_speaks_for_is_refused_with_a_way_out(adapter, tmp_path, capsys):
    def refused(*words: str) -> str:
        status, out, err = say(adapter, capsys, *words)
        assert (status, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    config = json.loads((adapter / "adapter_config.json").read_text())

    def given(**changed: object) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changed}))

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "tokenizer.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, other / "model.safetensors")
    assert "weights are not those of the bank's base (tiny). Make a bank" in refused("--base", str(other))
    given(base_model_name_or_path="/nowhere/at/all")
    assert "give its folder as --base" in refused()
    assert say(adapter, capsys, "--base", "tiny")[0] == 1
    for wrong in ({"r": 0}, {"lora_alpha": "4"}, {"lora_alpha": 1e300}, {"r": True}):
        given(**wrong)
        assert "must be numbers above 0 and below 1e6" in refused()
    given(use_dora=True)
    assert "use_dora: True: no bank has such adapters" in refused()
    given()
    write(adapter, torch.ones(1, 3))
    assert "has shape (1, 3), in the bank (tiny) it is (2, 3): another rank or base" in refused()
    write(adapter, torch.ones(2, 3), extra=torch.ones(2))
    assert "has extra, which the adapters of the bank (tiny) lack: other layers are adapted" in refused()
    write(adapter, torch.tensor([[torch.nan, 0, 0], [0, 1, 0]]))
    assert "lora_A.weight holds what is no finite number" in refused()
    write(adapter, torch.ones(2, 3, dtype=torch.int32))
    assert "holds what is no finite number" in refused()
    weights = adapter / "adapter_model.safetensors"
    header = json.dumps({NAME.format("A"): {"dtype": "F32", "shape": [2**40, 3], "data_offsets": [0, 24]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 24)
    assert "cannot be read" in refused()
    weights.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "pickles are not read" in refused()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"weights": [0.0]}, "not as many"),
        ({"std": [0.0] * 5}, "a std is not above 0"),
        ({"mean": ["nan"] * 5}, "no bank of adapters"),
        ({"threshold": 2.0}, "the threshold is no probability"),
        ({"found": 21}, "counts more"),
        ({"statistics": ["leading"]}, "its statistics are"),
        ({"shapes": [1]}, "no bank of adapters"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_a_bank_that_is_none_is_refused(change, why, tmp_path):
    path = tmp_path / "bank.json"
    path.write_text(json.dumps({**bank().as_dict(), **change}))
    with pytest.raises(DefenseError, match=why) as error:
        Bank.read(path)
    assert "fedllm-sec scan --calibrate" in str(error.value)


def test_the_shipped_bank_is_of_the_embedded_model_and_says_the_same_when_written_again():
    known = Bank.read(SHIPPED)
    assert known.sha256 == weights_hash("tiny")
    assert (known.clean, known.backdoored, known.false_positives, known.found) == (30, 30, 0, 29)
    assert known.as_dict() == json.loads(SHIPPED.read_text())


@pytest.mark.slow
def test_adapters_of_the_smoke_recipe_are_told_apart_by_the_shipped_bank(tmp_path):
    from fedllm_sec.api.scan import judged
    from fedllm_sec.defenses.spectrum import spectral_features
    from fedllm_sec.grid.bank import pairs_of, scales_of, trained

    recipe = Path(__file__).parent.parent / "recipes/smoke/scan.yaml"
    for made in trained(recipe, [], [5000, 5001]):
        task = made.federation.task
        found = spectral_features(pairs_of(made.vector, task.layout), scales_of(task))
        assert judged(found, Bank.read(SHIPPED)).flagged == made.backdoored
