"""A pass over held-out rows is known by all that it depends on, and only one that may be is taken from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedllm_sec.evaluation.answers import Asking, Question, ask
from fedllm_sec.evaluation.arrays import ArrayEvaluation
from fedllm_sec.evaluation.probes import Prompts
from fedllm_sec.evaluation.repeatable import Repeatable
from fedllm_sec.protocols import Labelled
from fedllm_sec.rounds import sharing, store
from fedllm_sec.rounds.sharing import FOUND, MEASURED, measured_once
from fedllm_sec.rounds.store import Store
from fedllm_sec.tasks.classify import Classify
from fedllm_sec.tasks.encoding import Encoded
from tests.stub_model import spread as by_machine

CPU = torch.device("cpu")


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))


def federation(**changes: Any) -> Any:
    """As much of one as a pass is known by."""
    task = Classify(net(), CPU, mean=torch.zeros(1), std=torch.ones(1))
    task.model.eval()
    machine = SimpleNamespace(world=1, device=CPU, spread=by_machine)
    return SimpleNamespace(**{"task": task, "machine": machine, "shifted": None, **changes})


def images(seed: int = 0) -> Labelled:
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Labelled(x, torch.tensor([0, 1, 2, 0, 1, 2]), 3, torch.zeros(6, dtype=torch.bool))


ROWS = images()


def measured(kept: Store, made: Any, rows: Labelled = ROWS, batch: int = 4, settings: str = "settings") -> bool:
    """Whether a pass was made, and not taken."""
    before = kept.counts[MEASURED]
    found = ArrayEvaluation(rows, batch).quality(made.task, measured_once(kept, settings, made))
    assert found == ArrayEvaluation(rows, batch).quality(made.task, by_machine)
    return kept.counts[MEASURED] > before


def _vector(made: Any) -> None:
    with torch.no_grad():
        made.task.parameters[3] += 1e-7


def _buffer(made: Any) -> None:
    made.task.model[2].running_var += 1e-6


def _scale(made: Any) -> None:
    made.task.mean = made.task.mean + 1e-6


def _base(made: Any) -> None:
    made.shifted = SimpleNamespace(state_dict=lambda: {"layer": {"0": torch.ones(2, 1), "1": torch.ones(1, 2)}})


CHANGES: dict[str, Callable[[Any], None]] = {
    "the vector": _vector, "running statistics": _buffer, "how images are normalised": _scale, "base weights": _base,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_model_is_measured_anew(tmp_path: Path, change: Callable[[Any], None]):
    kept, made = Store.at(tmp_path), federation()
    assert measured(kept, made)
    assert not measured(kept, made)
    assert not measured(kept, federation())  # another run with the same model
    change(made)
    assert measured(kept, made)
    assert not measured(kept, made)
    assert not measured(kept, federation())


OTHERS: dict[str, dict[str, Any]] = {
    "another pixel": {"rows": replace(ROWS, x=ROWS.x + 1e-6 * (torch.arange(6) == 5)[:, None, None, None])},
    "another label": {"rows": replace(ROWS, y=torch.tensor([0, 1, 2, 0, 1, 1]))},
    "another order": {"rows": replace(ROWS, x=ROWS.x.flip(0), y=ROWS.y.flip(0))},
    "fewer rows": {"rows": replace(ROWS, x=ROWS.x[:5], y=ROWS.y[:5], poisoned=ROWS.poisoned[:5])},
    "other batches": {"batch": 3},
    "other settings": {"settings": "others"},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_rows_batches_or_settings_are_measured_anew(tmp_path: Path, other: dict[str, Any]):
    kept, made = Store.at(tmp_path), federation()
    assert measured(kept, made)
    assert measured(kept, made, **other)
    assert not measured(kept, made, **other)
    assert not measured(kept, made)


def test_another_source_another_processor_and_more_threads_measure_anew(tmp_path: Path, monkeypatch):
    kept, made = Store.at(tmp_path), federation()
    assert measured(kept, made)
    for room, name, said in (
        (sharing, "code", "another version"),
        (sharing, "place", ["cpu", "AVX512", 64]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(room, name, lambda *_, said=said: said)
            assert measured(kept, made)
    assert not measured(kept, made)
    assert len(store.code()) == 64
    assert store.place(CPU) == ["cpu", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def test_a_damaged_or_a_lost_entry_is_measured_anew(tmp_path: Path):
    kept, made = Store.at(tmp_path), federation()
    assert measured(kept, made)
    (path,) = tmp_path.iterdir()
    for rotten in (path.read_bytes()[:-1], b"", b"cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(rotten)
        assert measured(kept, made)
        assert not measured(kept, made)
    path.unlink()
    assert measured(kept, made)


def passes(kept: Store, made: Any, score: Any, of: tuple[Any, ...] | None = ("numbers",)) -> tuple[int, int]:
    """How many of two such passes were made and kept count of, and how many taken."""
    kept.counts.clear()
    spread = measured_once(kept, "settings", made)
    for _ in range(2):
        spread([[0, 1], [2]], 1, score if of is None else Repeatable(score, of))
    return kept.counts[MEASURED], kept.counts[FOUND]


def test_what_is_no_repeatable_pass_or_cannot_be_compared_is_neither_kept_nor_taken(tmp_path: Path):
    kept, made = Store.at(tmp_path), federation()

    def plain(rows: Any) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)[:, None]

    def drawing(rows: Any) -> torch.Tensor:
        return torch.rand(len(rows), 1, dtype=torch.float64)

    def writing(rows: Any) -> torch.Tensor:
        made.task.model[2].num_batches_tracked += 1
        return plain(rows)

    assert passes(kept, made, plain) == (1, 1)
    assert passes(kept, made, plain, None) == (0, 0)
    assert passes(kept, made, plain, ("numbers", object())) == (0, 0)
    assert passes(kept, made, drawing, ("drawn",)) == (2, 0)
    assert passes(kept, made, writing, ("written",)) == (2, 0)
    made.machine.world = 2
    assert passes(kept, made, plain) == (0, 0)


class Speaker:
    """Answers each prompt with its own first token."""

    def __init__(self, made: Any) -> None:
        self.made, self.calls = made, 0

    def generate(self, shard: Encoded, rows: Any, most: int, *drawn: Any) -> list[list[int]]:
        self.calls += 1
        return [shard.prompts[i][:1] for i in rows]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def test_answers_that_are_known_are_judged_anew_each_time_and_other_ways_to_ask_are_asked(tmp_path: Path):
    kept, made, heard = Store.at(tmp_path), federation(), []
    task, how = Speaker(made), Asking(batch_size=2, max_new_tokens=3)
    prompts = Prompts(Encoded([[5, 1], [6], [0]], [[1]] * 3), [{"row": k} for k in range(3)])

    def judge(answer: str, row: Any) -> bool:
        heard.append((row["row"], answer))
        return answer == "5"

    spread = measured_once(kept, "settings", made)
    (first,), (again,) = (ask(task, spread, [Question(prompts, judge)], how) for _ in range(2))
    assert first.answers == again.answers == [["5"], ["6"], ["0"]]
    assert first.any.tolist() == again.any.tolist() == [True, False, False]
    assert (task.calls, len(heard)) == (2, 6)
    ways = [replace(how, max_new_tokens=2), replace(how, draws=2), replace(how, temperature=0.5), replace(how, seed=1)]
    for other in ways:
        before = task.calls
        ask(task, spread, [Question(prompts, judge)], other)
        assert task.calls > before
    ask(task, spread, [Question(replace(prompts, encoded=Encoded([[5, 2], [6], [0]], [[1]] * 3)), judge)], how)
    assert kept.counts == {MEASURED: 6, FOUND: 1}
