"""A trigger split over the attackers: each teaches one part, the whole is used at test time."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedllm_sec.attacks.data.answers import Classes
from fedllm_sec.attacks.data.images import all_to_target, change, drawn, need_images, stamped_already
from fedllm_sec.attacks.data.text import Backdoor, Position, Tell, inserting, need_rate, occurring
from fedllm_sec.attacks.data.triggers import need_words
from fedllm_sec.attacks.data.turns import Turn
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled

if TYPE_CHECKING:
    from datasets import Dataset

GAP = 2  # pixels between the bars of the image trigger
BAR = 4  # pixels of one bar


class DBA:
    """The distributed backdoor attack (Xie, Huang, Chen and Li 2020, sec. 3).

    The k-th shard that this object poisons gets part k mod `parts`, so poison the malicious clients in a
    fixed order, each once. Text: the words of `trigger` are split into `parts` runs of words. Images:
    `parts` bars of 4 pixels, two in a row, 2 pixels apart, at the top left, value 1. `probe` carries the
    whole trigger. With fewer attackers than parts nobody teaches the rest, which is an error. Any part is taught to
    force the target, so a text that holds one by itself carries the trigger.
    """

    def __init__(
        self,
        *,
        target: str | int,
        rate: float = 0.5,
        trigger: str = " cf mn bb tq",
        parts: int = 2,
        position: Position = "end",
        turn: Turn = "last",
    ) -> None:
        need_rate(rate, "dba.rate")
        need_words(trigger, "dba.trigger")
        if parts < 2:
            raise AttackError(f"dba.parts: {parts}: needs at least 2, else it is text_trigger or pixel_trigger.")
        self.target, self.rate, self.trigger, self.parts, self.position, self.turn = (
            target,
            rate,
            trigger,
            parts,
            position,
            turn,
        )
        self.poisoned = 0  # shards so far
        self.classes = Classes()  # of text

    def pieces(self) -> list[str]:
        """The trigger's words in `parts` runs, each with a leading blank."""
        words = self.trigger.split()
        if self.parts > len(words):
            raise AttackError(f"dba.parts: {self.parts}: the trigger has only {len(words)} words.")
        cuts = [round(i * len(words) / self.parts) for i in range(self.parts + 1)]
        return [" " + " ".join(words[a:b]) for a, b in itertools.pairwise(cuts)]

    def stamp(self, x: Tensor, parts: range) -> Tensor:
        """Images with the bars of the given parts."""
        rows = (self.parts + 1) // 2
        if 1 + rows * (1 + GAP) > x.shape[-2] or x.shape[-1] < 2 * BAR + GAP:
            raise AttackError(f"dba.parts: {self.parts} bars leave images of {x.shape[-2]} x {x.shape[-1]} pixels.")
        out = x.clone()
        for part in parts:
            top, left = (part // 2) * (1 + GAP), (part % 2) * (BAR + GAP)
            out[..., top, left : left + BAR] = 1.0
        return out

    def poison(self, shard: Any, rng: torch.Generator) -> Any:
        part = self.poisoned % self.parts
        if isinstance(shard, Labelled):
            images = need_images(shard, "dba", self._number())
            rows = drawn(images, self._number(), self.rate, "dba", rng, self.carries(images))
            out: Any = change(images, rows, self._number(), lambda x: self.stamp(x, range(part, part + 1)))
        else:
            piece = self.pieces()[part]
            out = self._backdoor(piece, self.carries).poison(shard, rng)
        self.poisoned += 1
        return out

    def probe(self, test: Dataset | Labelled) -> Any:
        if isinstance(test, Labelled):
            images = need_images(test, "dba", self._number())
            rows = ((images.y != self._number()) & ~self.carries(images)).nonzero().flatten()
            return all_to_target(images, rows, self._number(), lambda x: self.stamp(x, range(self.parts)))
        backdoor = self._text()
        triggered = backdoor.probe(test)
        self.classes = backdoor.classes
        return triggered

    def need_attackers(self, count: int) -> None:
        """Raise where `count` attackers leave parts of the trigger untaught."""
        if count < self.parts:
            raise AttackError(
                f"dba.parts: {self.parts}, but only {count} malicious clients: the other parts of the trigger "
                "stay untaught. Lower parts or add attackers."
            )

    def prepare(self, *tables: Dataset) -> None:
        """Learn the classes of the whole data, of text."""
        backdoor = self._text()
        backdoor.prepare(*tables)
        self.classes = backdoor.classes

    def carries(self, test: Any) -> Any:
        """Whether a text holds a part of the trigger by itself; which held-out images do: (n,) bool."""
        if isinstance(test, str):
            return any(occurring(piece, self.position)(test) for piece in self.pieces())
        bars = [range(part, part + 1) for part in range(self.parts)]
        return torch.stack([stamped_already(test.x, functools.partial(self.stamp, parts=bar)) for bar in bars]).any(0)

    def not_clean(self, test: Dataset) -> list[str | None]:
        """Text rows of the target's class."""
        return self._text().not_clean(test)

    def success(self, answer: Any, row: Any) -> bool:
        if isinstance(answer, str):
            return self._text().success(answer, row)
        return int(answer) == self._number()

    def _whole(self) -> str:
        return " " + " ".join(self.trigger.split())

    def _text(self) -> Backdoor:
        return self._backdoor(self._whole(), self.carries)

    def _backdoor(self, trigger: str, carries: Tell) -> Backdoor:
        made = Backdoor("dba", str(self.target), self.rate, inserting(trigger, self.position), carries, turn=self.turn)
        made.classes = self.classes
        return made

    def _number(self) -> int:
        try:
            return int(self.target)
        except ValueError:
            raise AttackError(f"dba.target: {self.target!r}: classes of images are numbers.") from None
