"""A round tried on random rows before anything is trained: what defense and attack cannot do is said at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm_sec.attacks.threat import Threat
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.errors import AttackError, DefenseError, IdleAttack
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext
from fedllm_sec.seeds import generator_for

MOST = 8  # of a parameter's sizes
UNNAMED = Layout.single(64)
NAMES = ("layer", "layout", "lora_A")  # errors that speak of these may be the unnamed vector's fault


@dataclass(frozen=True)
class Rehearsal:
    """A cohort of `ids` who send random rows of this layout. The unnamed one stands in while no model is there."""

    ids: Sequence[str]
    total: int  # clients of the federation
    rounds: int
    seed: int
    root: bool  # whether the server has an update of its own
    layout: Layout = UNNAMED

    def problems(self, defense: Pipeline, threat: Threat | None) -> list[str]:
        """What goes wrong. Both are used up: make others for the run."""
        found = []
        with warnings.catch_warnings(record=True) as said:  # random rows are no reason to warn
            warnings.simplefilter("always")
            for place, act in (("defense", self._defend), ("attack", self._forge)):
                try:
                    act(defense, threat)
                except (AttackError, DefenseError) as error:
                    if self.layout is not UNNAMED or not any(word in str(error) for word in NAMES):
                        found.append(f"{place}: {error}")
        if len(self.ids) == self.total:  # then every round has this cohort
            found += [str(warning.message) for warning in said if issubclass(warning.category, IdleAttack)]
        return found

    def _rows(self) -> UpdateMatrix:
        rng = generator_for(self.seed, "rehearsal")
        rows = torch.randn(len(self.ids), self.layout.size, generator=rng)
        return UpdateMatrix.of(rows, ids=self.ids, layout=self.layout)

    def _context(self, rows: UpdateMatrix) -> RoundContext:
        return RoundContext(
            round=1,
            global_vector=torch.zeros(rows.d),
            layout=rows.layout,
            rng=generator_for(self.seed, "rehearsal", "defense"),
            rounds=self.rounds,
            root_update=rows.rows[0] if self.root else None,
        )

    def _defend(self, defense: Pipeline, threat: Threat | None) -> None:
        rows = self._rows()
        update = defense.decide(rows, self._context(rows)).update
        defense.finish(update, self._context(rows))

    def _forge(self, defense: Pipeline, threat: Threat | None) -> None:
        """As many attackers as a round has on average, in a round of the attack."""
        if threat is None or not threat.malicious:
            return
        rows = self._rows()
        m = round((threat.redrawn or len(threat.malicious)) * rows.n / self.total)
        m = min(max(m, 1), max(rows.n - 1, 1))
        threat.malicious, threat.redrawn, threat.probability = frozenset(self.ids[:m]), None, 1.0

        def try_it(guess: UpdateMatrix) -> Decision:
            return replace(defense.rehearse(guess, self._context(guess)), step=lambda update: update)

        vector = torch.zeros(rows.d)
        threat.forge(rows, vector=vector, last_update=None, round=threat.start, defense=try_it)


def scaled_down(layout: Layout) -> Layout:
    """The same names with small shapes, which still fit each other."""
    return Layout(layout.names, tuple(tuple(min(size, MOST) for size in shape) for shape in layout.shapes))
