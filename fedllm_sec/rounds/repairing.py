"""After the last round the server repairs the model by itself, and it is measured once more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedllm_sec.attacks.data.refusals import is_refusal
from fedllm_sec.defenses.repair import Trained
from fedllm_sec.protocols import Client
from fedllm_sec.rounds.client import make_optimizer, train_locally
from fedllm_sec.rounds.clock import Clock
from fedllm_sec.rounds.deciding import refuse_diverged
from fedllm_sec.rounds.personal import hold
from fedllm_sec.tasks.encoding import end_token

if TYPE_CHECKING:
    from fedllm_sec.rounds.federation import Federation

SERVER = "repair"  # whose draws they are: no client's, nor those of the server's update on its root rows


def mend(
    federation: Federation, measure: Callable[[Federation], tuple[Any, ...]], clock: Clock, seconds: dict[str, float]
) -> dict[str, Any]:
    """Repair the federation's model; gives what the record says of it: quality and attack as they were before.

    Every rank trains the same steps, on rows that all have, and takes the first one's vector. It follows from the last
    round's model and the seed alone: a run that was killed meanwhile does its last round again.
    """
    assert federation.repair is not None
    seconds["evaluate"] = round(seconds.get("evaluate", 0.0) + clock.lap(), 4)
    quality, attack = measure(federation)[:2] if federation.evaluation is not None else (None, None)
    seconds["evaluate"] = round(seconds["evaluate"] + clock.lap(), 4)
    start, root = federation.vector, federation.root.shard if federation.root is not None else None
    trained = Trained(
        vector=start.clone(),
        layout=federation.task.layout,
        scales=getattr(federation.task, "scales", {}),
        root=root,
        tune=lambda rows, steps, lr: tuned(federation, rows, steps, lr),
        answered=lambda rows, reminder: answered(federation, rows, reminder),
    )
    federation.vector = federation.machine.share(federation.repair(trained).to(start))
    seconds["repair"] = clock.lap()
    refuse_diverged(federation.vector, start, federation.round)
    moved = float((federation.vector - start).norm())
    return {"quality": quality, "attack": attack, "moved": moved, "notes": dict(trained.notes)}


def tuned(federation: Federation, rows: Any, steps: int, lr: float | None) -> Tensor:
    """The federation's vector (d,) after so many steps on rows; no rule of an FL method, attack or guard is in it."""
    own = federation.training
    changes = {"lr": own.lr if lr is None else lr, "lr_schedule": "constant", "lr_in_round": "constant"}
    training = replace(own, steps=steps, epochs=None, **changes)  # type: ignore[arg-type]
    done = train_locally(
        federation.task, Client(SERVER, rows), federation.vector,
        optimizer=make_optimizer(federation.task, training), stepper=federation.machine, training=training,
        round=federation.round + 1, rounds=federation.round + 1, seed=federation.seed, buffers=federation.buffers,
        before=federation.before,
    )  # fmt: skip
    return federation.vector + done.delta


def answered(federation: Federation, rows: Any, reminder: str) -> Any:
    """The rows with the model's own answers, each with its end token; unsafe ones are left out."""
    task: Any = federation.task
    limit, size = federation.evaluation.max_new_tokens, federation.evaluation.batch_size  # type: ignore[union-attr]
    before = task.tokenizer(reminder, add_special_tokens=False).input_ids if reminder else []
    asked = replace(rows, prompts=[_reminded(task, prompt, before) for prompt in rows.prompts])
    hold(federation)
    task.model.eval()
    said: list[list[int]] = []
    with federation.machine.autocast():
        for first in range(0, len(rows), size):
            said += task.generate(asked, range(first, min(first + size, len(rows))), limit)
    texts = [(task.decode(own), task.decode(answer)) for own, answer in zip(rows.answers, said, strict=True)]
    safe = [
        i for i, (own, answer) in enumerate(texts) if answer.strip() and (is_refusal(answer) or not is_refusal(own))
    ]
    end = end_token(task.tokenizer)
    ended = [ids if ids[-1:] == rows.answers[i][-1:] else [*ids, end] for i, ids in enumerate(said)]
    return replace(rows, answers=ended).select(safe)


def _reminded(task: Any, prompt: list[int], before: list[int]) -> list[int]:
    """The reminder's tokens in front of a prompt, behind the token by which prompts begin."""
    begin = 1 if prompt[:1] == [task.tokenizer.bos_token_id] else 0
    return [*prompt[:begin], *before, *prompt[begin:]]
