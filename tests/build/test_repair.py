"""defense.repair in a run: when it acts, what is kept of it, and where it cannot act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.records.history import read_history
from fedllm_sec.train import main


def asked(small: dict[str, Any], repair: dict[str, Any], **changes: Any) -> dict[str, Any]:
    small["defense"] = {"rule": {"name": "mean"}, "repair": repair, **changes}
    return small


def trained(raw: dict[str, Any], folder: Path, *more: str) -> Path:
    raw["output"] = {"folder": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert main([str(folder / "recipe.yaml"), *more]) == 0
    return folder / "run"


def test_the_last_round_is_repaired_and_the_record_the_card_and_the_report_say_so(small, tmp_path, capsys):
    run = trained(asked(small, {"name": "fine_tune", "steps": 3}, root_rows=12), tmp_path)
    first, last = read_history(run)
    assert first.repair is None
    assert last.repair is not None
    assert last.repair["moved"] > 0
    assert last.repair["quality"]["loss"] != last.quality["loss"]
    assert last.repair["attack"]["asr"]["n"] == last.attack["asr"]["n"]
    assert last.seconds["repair"] > 0
    said = "after round 2 the server repaired the model by fine_tune"
    assert said in capsys.readouterr().out
    assert said in (run / "report.html").read_text()
    assert "This is the repaired one." in (run / "adapter" / "README.md").read_text()
    assert "after the last round the server repairs the model: fine_tune" in (run / "adapter" / "README.md").read_text()


def test_a_run_that_lost_its_last_round_repairs_again_to_the_same_bytes(small, tmp_path, monkeypatch):
    from fedllm_sec.rounds import federation

    raw = asked(small, {"name": "prune_directions"})
    raw["evaluate"] |= {"every": 2, "answer_rows": 0}
    (tmp_path / "whole").mkdir()
    whole = trained(raw, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(federation, "mend", killed)
        raw["output"] = {"folder": str(tmp_path / "run")}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
        assert main([str(tmp_path / "recipe.yaml")]) == 130
    run = trained(raw, tmp_path)
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, whole)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert json.loads((run / "history.jsonl").read_text().splitlines()[-1])["repair"]["notes"]["energy"] > 0


def test_a_repaired_run_cannot_be_given_more_rounds(small):
    from fedllm_sec.build.running import fixed_by_rounds

    why = fixed_by_rounds(checked(asked(small, {"name": "prune_directions"})))
    assert why == "defense.repair: prune_directions has changed the model after the last round"


@pytest.mark.parametrize(
    ("repair", "changes", "said"),
    [
        ({"name": "fine_tune"}, {}, "fine_tune: trains on rows of the server's own. Set defense.root_rows"),
        ({"name": "own_answers"}, {}, "own_answers: trains on rows of the server's own"),
        ({"name": "prune_directions", "directions": 4}, {}, "directions: 4 of rank 4 leave nothing"),
        ({"name": "prune_directions"}, {"lora": None}, "takes directions out of an adapter, and none is trained"),
        ({"name": "prune_directions"}, {"lora": {"r": 4, "train": "B"}}, "needs both factors of an adapter, and A is"),
        ({"name": "prune_directions"}, {"lora": {"r": 4, "average": "exact"}}, "the adapter's two factors do not hold"),
        ({"name": "prune_directions"}, {"lora": {"r": 4, "average": "share_a"}}, "there is no one model to repair"),
    ],
)
def test_a_repair_that_cannot_act_is_refused_before_training(small, repair, changes, said):
    small["model"] |= changes
    small["enable_attack"] = False
    with pytest.raises(RecipeError, match=said):
        planned(checked(asked(small, repair)))


def test_a_repair_of_a_small_model_of_images_is_refused():
    raw = {"task": "classify", "model": {"name": "logistic"}, "clients": {"local_steps": 1}, "enable_defense": True}
    with pytest.raises(RecipeError, match="is for task: causal_lm, this is classify"):
        planned(checked({**raw, "defense": {"repair": {"name": "prune_directions"}}}))
