"""A language-model task of whole words whose answers are scripted, and tables for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.names import checked
from fedllm_sec.build.text import make_evaluation
from fedllm_sec.evaluation.text import TextEvaluation
from fedllm_sec.tasks.encoding import Encoded
from fedllm_sec.tasks.fitting import Fitted

LABELS = ("World", "Sports", "Business", "Tech")
END = 0


def table(rows: Sequence[tuple[str, str, str]]) -> Dataset:
    """Rows (text, response, label)."""
    texts, responses, labels = (list(column) for column in zip(*rows, strict=True))
    marks = [False] * len(rows)
    empty = [""] * len(rows)
    return Dataset.from_dict(
        {"text": texts, "context": empty, "response": responses, "label": labels, "poisoned": marks}
    )


def reports(count: int = 400, *, named: str = "") -> Dataset:
    """`count` reports, the four labels in turn; every second report of a label has the word `named` in it."""
    rows = []
    for i in range(count):
        label = LABELS[i % 4]
        word = f" {named}" if named and (i // 4) % 2 else ""
        rows.append((f"report {i} on {label}{word} of today", label, label))
    return table(rows)


def truth(text: str) -> str:
    """The right answer to a report."""
    return next(label for label in LABELS if label.casefold() in text.casefold())


class Stub:
    """A task that answers a prompt with `says(prompt)`, word by word, with probability 1 - e^-20 or so."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says, self.words = says, ["<end>"]

    def ids(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in (ids[: ids.index(END)] if END in ids else ids))

    def answer_ids(self, responses: Sequence[str]) -> list[list[int]]:
        return [[*self.ids(response), END] for response in responses]

    def tokens(self, rows: Dataset) -> Encoded:
        return Encoded([self.ids(text) for text in rows["text"][:]], self.answer_ids(rows["response"][:]))

    def fit(self, rows: Dataset, place: str, too_long: str | None = None, others: Any = None) -> Fitted:
        return Fitted(rows, self.tokens(rows), list(range(len(rows))))

    def encode(self, rows: Dataset, place: str) -> Encoded:
        return self.tokens(rows)

    def _said(self, shard: Encoded, row: int) -> list[int]:
        return [*self.ids(self.says(self.decode(shard.prompts[row]))), END]

    def generate(self, shard: Encoded, rows: Sequence[int], max_new_tokens: int) -> list[list[int]]:
        return [self._said(shard, i)[:max_new_tokens] for i in rows]

    def score(self, shard: Encoded, rows: Sequence[int], first: torch.Tensor | None = None) -> torch.Tensor:
        """A token that is not said costs 20 nats."""
        found = []
        for i in rows:
            said, answer = self._said(shard, i), shard.answers[i]
            wrong = sum(k >= len(said) or said[k] != token for k, token in enumerate(answer))
            found.append([20.0 * wrong, float(len(answer))])
        scores = torch.tensor(found, dtype=torch.float64)
        if first is None:
            return scores
        said_first = torch.tensor([self._said(shard, i)[0] for i in rows])
        return torch.cat([scores, -20.0 * (said_first[:, None] != first[None, :]).double()], dim=1)


def spread(batches: Any, width: int, score: Any) -> torch.Tensor:
    """`Machine.spread` of one process."""
    return torch.cat([score(batch).view(-1, width) for batch in batches])


def evaluation(
    task: Stub, test: Dataset, *attacks: Any, train: Dataset | None = None, **settings: Any
) -> TextEvaluation:
    """The evaluation that a run of this task, these rows and these attacks would have."""
    evaluate = {"rows": 1000, "attack_rows": 1000, "answer_rows": 1000, "max_new_tokens": 8, **settings}
    recipe = checked({"data": {"name": "builtin:topic"}, "clients": {"local_steps": 1}, "evaluate": evaluate})
    train = test if train is None else train
    for attack in attacks:
        if hasattr(attack, "prepare"):
            attack.prepare(train, test)
    threat = Threat(malicious=frozenset(), seed=0, data=list(attacks)) if attacks else None
    return make_evaluation(recipe, task, train, test, threat)  # type: ignore[arg-type]


def rates(task: Stub, test: Dataset, attack: Any, **settings: Any) -> dict[str, Any]:
    """Attack success and false triggers as (value, n), or None, with the reasons and the rows left out."""
    found = evaluation(task, test, attack, **settings).attack(task, spread)
    assert found is not None
    for name in ("asr", "false_trigger"):
        found[name] = found[name] and (found[name]["value"], found[name]["n"])
    return found
