"""Backdoors in images: a patch, the rare tail of a class, a feature that occurs by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fedllm_sec.attacks.data.text import need_rate, pick
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled

Corner = Literal["top_left", "top_right", "bottom_left", "bottom_right"]
Rows = Sequence[int] | Tensor


def need_images(shard: Any, name: str, target: int) -> Labelled:
    """The shard, if it holds labelled arrays, is not empty and has the target class."""
    if not isinstance(shard, Labelled):
        raise AttackError(f"{name}: is for images, and this shard is a {type(shard).__name__}. Choose a text attack.")
    if len(shard.y) == 0:
        raise AttackError(f"{name}: a malicious client's shard is empty: nothing to poison.")
    if not 0 <= target < shard.classes:
        raise AttackError(f"{name}.target: {target}: classes go from 0 to {shard.classes - 1}.")
    return shard


def change(shard: Labelled, rows: Rows, target: int, stamp: Callable[[Tensor], Tensor] | None = None) -> Labelled:
    """A new shard whose chosen rows are stamped, labelled `target` and marked as poisoned.

    Stamped pixels are fixed: augmentation moves the image under them, as if the attacker stamped after it.
    """
    at = torch.as_tensor(rows, dtype=torch.long)
    x, y, marks, fixed = shard.x, shard.y.clone(), shard.poisoned.clone(), shard.fixed
    y[at], marks[at] = target, True
    if stamp is not None:
        x = x.clone()
        fixed = torch.zeros(len(x), *x.shape[-2:], dtype=torch.bool) if fixed is None else fixed.clone()
        x[at] = stamp(x[at])
        fixed[at] |= area(stamp, x)
    return replace(shard, x=x, y=y, poisoned=marks, fixed=fixed)


def area(stamp: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The pixels that `stamp` sets whatever was there, in images like x (n, channels, h, w): (h, w) bool."""
    black = x.new_zeros(1, *x.shape[1:])
    return (stamp(black) == stamp(torch.ones_like(black)))[0].all(0)


def stamped_already(x: Tensor, stamp: Callable[[Tensor], Tensor]) -> Tensor:
    """Which images (n, channels, h, w) the stamp leaves as they are, because they carry it by themselves: (n,) bool."""
    same: Tensor = (stamp(x) == x).flatten(1).all(1)
    return same


def subset(shard: Labelled, rows: Rows) -> Labelled:
    """The chosen rows as a shard of their own."""
    at = torch.as_tensor(rows, dtype=torch.long)
    fixed = None if shard.fixed is None else shard.fixed[at]
    return replace(shard, x=shard.x[at], y=shard.y[at], poisoned=shard.poisoned[at], fixed=fixed)


def all_to_target(test: Labelled, rows: Rows, target: int, stamp: Callable[[Tensor], Tensor] | None = None) -> Labelled:
    """The chosen held-out rows, stamped and labelled with what the attack wants."""
    chosen = subset(test, rows)
    return change(chosen, range(len(chosen.y)), target, stamp)


def drawn(
    shard: Labelled, target: int, rate: float, name: str, rng: torch.Generator, carried: Tensor | None = None
) -> list[int]:
    """round(rate * rows) row numbers of the shard, at least one, those of other classes first.

    Rows that carry the trigger by themselves, `carried` (n,), are all among them, even beyond `rate`: they would teach
    another answer to it. Rows that an earlier attack has poisoned stay as it made them; where too few are left it is
    an error.
    """
    count, free = max(1, round(rate * len(shard.y))), ~shard.poisoned
    if count > int(free.sum()):
        raise AttackError(
            f"{name}.rate: {rate}: wants {count} of a client's {len(shard.y)} rows, and earlier attacks have left "
            f"{int(free.sum())}. Lower the rates."
        )
    other, same = ((free & where).nonzero().flatten().tolist() for where in (shard.y != target, shard.y == target))
    if carried is None or not bool(carried.any()):
        return pick(count, other, same, rng)
    first = (free & carried & (shard.y != target)).nonzero().flatten().tolist()
    rest = sorted(set(other) - set(first))
    return sorted(first + pick(max(0, count - len(first)), rest, same, rng))


def marked(rows: Rows, shard: Labelled) -> Tensor:
    """Row numbers as marks: (n,) bool."""
    marks = torch.zeros(len(shard.y), dtype=torch.bool)
    marks[torch.as_tensor(rows, dtype=torch.long)] = True
    return marks


def unpoisoned(rows: Sequence[int], shard: Labelled) -> list[int]:
    """The rows that no earlier attack has poisoned."""
    return [i for i in rows if not shard.poisoned[i]]


class PixelTrigger:
    """A patch of constant value in a corner forces one class (Gu et al. 2017, sec. 3; BadNets).

    round(rate * images) images of the shard, those of other classes first, get a size x size patch in all
    channels. `value` is the patch's, from 0 (black) to 1 (white) as all pixels here.
    """

    def __init__(
        self,
        *,
        target: int,
        rate: float = 0.5,
        size: int = 3,
        value: float = 1.0,
        corner: Corner = "bottom_right",
        margin: int = 1,
    ) -> None:
        need_rate(rate, "pixel_trigger.rate")
        if size < 1 or margin < 0:
            raise AttackError(f"pixel_trigger: size={size}, margin={margin}: needs size >= 1 and margin >= 0.")
        if not 0.0 <= value <= 1.0:
            raise AttackError(f"pixel_trigger.value: {value}: pixels go from 0 (black) to 1 (white). Divide by 255.")
        self.target, self.rate = target, rate
        self.size, self.value, self.corner, self.margin = size, value, corner, margin

    def stamp(self, x: Tensor) -> Tensor:
        """Images (k, channels, height, width) with the patch."""
        height, width = x.shape[-2:]
        reach = self.size + self.margin
        if reach > min(height, width):
            raise AttackError(
                f"pixel_trigger: a patch of {self.size} + margin {self.margin} leaves {height} x {width}."
            )
        top = self.margin if self.corner.startswith("top") else height - reach
        left = self.margin if self.corner.endswith("left") else width - reach
        out = x.clone()
        out[..., top : top + self.size, left : left + self.size] = self.value
        return out

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "pixel_trigger", self.target)
        rows = drawn(shard, self.target, self.rate, "pixel_trigger", rng, self.carries(shard))
        return change(shard, rows, self.target, self.stamp)

    def probe(self, test: Any) -> Labelled:
        """The other classes' images, stamped; those that carry the patch by themselves are no probe."""
        test = need_images(test, "pixel_trigger", self.target)
        rows = (test.y != self.target) & ~self.carries(test)
        return all_to_target(test, rows.nonzero().flatten(), self.target, self.stamp)

    def carries(self, test: Labelled) -> Tensor:
        """Held-out images that carry the patch by themselves: (n,) bool."""
        return stamped_already(test.x, self.stamp)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target


class EdgeCase:
    """The rare tail of a class is relabelled (Wang et al. 2020, "Attack of the Tails").

    The tail is the share `tail` of a class's images that lie farthest, in pixel space, from the mean image
    of that class in the shard. `source` None takes the tails of all classes but the target. Deviation: the
    paper brings edge cases from other data sets; here they come from the shard itself, so nothing has to be
    downloaded.
    """

    def __init__(self, *, target: int, source: int | None = None, tail: float = 0.1) -> None:
        need_rate(tail, "edge_case.tail")
        if source == target:
            raise AttackError(f"edge_case.source: {source} is also the target. Choose another class.")
        self.target, self.source, self.tail = target, source, tail

    def rows(self, shard: Labelled) -> list[int]:
        """Row numbers of the tails, ascending."""
        if self.source is not None and not 0 <= self.source < shard.classes:
            raise AttackError(f"edge_case.source: {self.source}: classes go from 0 to {shard.classes - 1}.")
        classes = range(shard.classes) if self.source is None else [self.source]
        found: list[int] = []
        for c in classes:
            members = (shard.y == c).nonzero().flatten()
            if c == self.target or len(members) == 0:
                continue
            flat = shard.x[members].flatten(1).double()
            far = (flat - flat.mean(0)).norm(dim=1)
            count = max(1, round(self.tail * len(members)))
            found += members[far.argsort(descending=True, stable=True)[:count]].tolist()
        return sorted(found)

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "edge_case", self.target)
        return change(shard, unpoisoned(self.rows(shard), shard), self.target)

    def probe(self, test: Any) -> Labelled:
        test = need_images(test, "edge_case", self.target)
        return all_to_target(test, self.rows(test), self.target)

    def acts_on(self, test: Labelled) -> Tensor:
        """The held-out tails: (n,) bool."""
        return marked(self.rows(test), test)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target


def _colour(x: Tensor, channel: int) -> Tensor:
    """How much stronger one channel is than the mean of all."""
    if x.shape[1] < 3:
        raise AttackError(f"semantic.feature: colours need 3 channels, these images have {x.shape[1]}. Use brightness.")
    return (x[:, channel] - x.mean(1)).flatten(1).mean(1)


# Features that occur by themselves: images (k, channels, height, width) -> strength (k,).
FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "brightness": lambda x: x.flatten(1).mean(1),
    "darkness": lambda x: -x.flatten(1).mean(1),
    "contrast": lambda x: x.flatten(1).std(1, correction=0),
    "vertical_stripes": lambda x: x.diff(dim=-1).abs().flatten(1).mean(1),
    "horizontal_stripes": lambda x: x.diff(dim=-2).abs().flatten(1).mean(1),
    "red": lambda x: _colour(x, 0),
    "green": lambda x: _colour(x, 1),
    "blue": lambda x: _colour(x, 2),
}


class Semantic:
    """Images with a feature that occurs by itself are relabelled; no pixel changes (Bagdasaryan et al.
    2020, sec. 4).

    Chosen are the images whose feature is above `above`, or without it the share `share` with the strongest
    feature. `rows` and `probe_rows` name row numbers of the shard and of the test set instead.
    """

    def __init__(
        self,
        *,
        target: int,
        feature: Literal[
            "brightness",
            "darkness",
            "contrast",
            "vertical_stripes",
            "horizontal_stripes",
            "red",
            "green",
            "blue",
        ] = "brightness",
        share: float = 0.1,
        above: float | None = None,
        rows: list[int] | None = None,
        probe_rows: list[int] | None = None,
    ) -> None:
        need_rate(share, "semantic.share")
        if (rows is None) != (probe_rows is None):
            raise AttackError("semantic: rows and probe_rows belong together: give both or neither.")
        if above is not None and not math.isfinite(above):
            raise AttackError(f"semantic.above: {above}: must be a finite number, a strength of the feature.")
        self.target, self.feature, self.share, self.above = target, feature, share, above
        self.listed, self.probe_listed = rows, probe_rows

    def rows(self, shard: Labelled, listed: list[int] | None) -> list[int]:
        """Row numbers with the feature, ascending, without those of the target class."""
        if listed is not None:
            bad = [i for i in listed if not 0 <= i < len(shard.y)]
            if bad:
                raise AttackError(f"semantic.rows: {bad[:3]}: the set has rows 0 to {len(shard.y) - 1}.")
            found = torch.tensor(sorted(set(listed)), dtype=torch.long)
        else:
            strength = FEATURES[self.feature](shard.x.float())
            if self.above is not None:
                found = (strength > self.above).nonzero().flatten()
            else:
                count = max(1, round(self.share * len(shard.y)))
                found = strength.argsort(descending=True, stable=True)[:count].sort().values
        return [i for i in found.tolist() if int(shard.y[i]) != self.target]

    def poison(self, shard: Any, rng: torch.Generator) -> Labelled:
        shard = need_images(shard, "semantic", self.target)
        return change(shard, unpoisoned(self.rows(shard, self.listed), shard), self.target)

    def probe(self, test: Any) -> Labelled:
        test = need_images(test, "semantic", self.target)
        return all_to_target(test, self.rows(test, self.probe_listed), self.target)

    def acts_on(self, test: Labelled) -> Tensor:
        """Held-out images with the feature: (n,) bool."""
        return marked(self.rows(test, self.probe_listed), test)

    def success(self, answer: Any, row: Any) -> bool:
        return int(answer) == self.target
