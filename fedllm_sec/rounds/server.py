"""The server's side of one round: what it does with the rows, for real and as attackers who know it try it out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm_sec.algorithms.taken import Taken, taken
from fedllm_sec.defenses.claims import client_shares
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.screen import screen
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.shown import copied
from fedllm_sec.models.function import Classifier, Indicator
from fedllm_sec.protocols import Decision, Labelled, RoundContext, ServerContext, ServerRule
from fedllm_sec.rounds.averaging import without
from fedllm_sec.seeds import generator_for


@dataclass(frozen=True)
class ServerRound:
    """Rows are received, decided on and stepped with; a rehearsal does the same and leaves no trace."""

    defense: Pipeline
    rule: ServerRule
    start: Tensor  # (d,) the global vector
    last_update: Tensor | None  # (d,)
    root_update: Tensor | None  # (d,) times its factor
    factors: Mapping[str, float]  # id of a client in the cohort -> what its row is multiplied by before the defense
    sizes: Mapping[str, float]  # id of any client -> examples it holds
    layout: Layout
    chunk_mb: float | None
    steps: float  # the median of the claimed local steps
    lr: float
    seed: int
    round: int
    rounds: int
    before: int = 0  # rounds that were done before the first: draws go on from theirs
    frozen: Sequence[slice] = ()  # what of a row is not taken in this round
    root_rows: Labelled | None = None  # the server's clean data, where they are images
    classifier: Classifier | None = None  # its model, where it is one of images
    indicator: Indicator | None = None  # what it has planted in what it sent

    def context(self, purpose: str = "defense") -> RoundContext:
        """What a defense may know, in copies: whatever it does with them, the model is the server's own.

        Contexts of one purpose have one seed; the pipeline gives each of its stages a stream of its own.
        """
        return RoundContext(
            round=self.round,
            global_vector=self.start.clone(),
            layout=self.layout,
            rng=generator_for(self.seed, self.before + self.round, purpose),
            rounds=self.rounds,
            last_update=copied(self.last_update),
            root_update=copied(self.root_update),
            root_rows=self.root_rows,
            classifier=self.classifier,
            indicator=self.indicator,
        )

    def receive(self, updates: UpdateMatrix) -> tuple[UpdateMatrix, dict[str, str]]:
        """The rows the defense gets, screened and rescaled, and why the others are set aside, by client id."""
        clean, quarantined = screen(updates)
        clean = without(clean, self.frozen)
        own = torch.tensor([self.factors[id] for id in clean.ids], dtype=torch.float64)
        return (clean if bool((own == 1).all()) else clean.mix(torch.diag(own))), quarantined

    def step(
        self, decision: Decision, rows: UpdateMatrix, rule: ServerRule, defense: Pipeline, purpose: str
    ) -> tuple[Tensor, Taken]:
        """The new global vector (d,), by the server's rule and the stages after it, and what was taken of the rows."""
        took = taken(decision.weights, client_shares(defense.rule, self.sizes, rows.ids))
        known = ServerContext(
            steps=self.steps,
            lr=self.lr,
            share=took.share,
            weight=took.weight,
            weights=decision.weights,
            factors=torch.tensor([self.factors[id] for id in rows.ids], dtype=torch.float64),
        )
        vector = rule(self.start.clone(), decision.update.to(self.start), known)
        return defense.finish(vector, self.context(purpose)).to(self.start), took

    def rehearse(self, guess: UpdateMatrix) -> Decision:
        """What would be decided on such rows, but for the rule's random draws, and `step`: how the model would move.

        The rows are screened and rescaled by the claimed steps, the rule has its present memory, and the server's
        optimizer and the stages after it theirs. Nothing of it is remembered.
        """
        if strange := [id for id in guess.ids if id not in self.factors]:
            raise AttackError(
                f"rehearsal: rows of {', '.join(strange[:5])}, who are not in this round. Rules remember by client id "
                "and weigh by count: make the rows with fedllm_sec.attacks.received(view, forged)."
            )
        mine = replace(guess, layout=self.layout, chunk_mb=self.chunk_mb, device=self.start.device)
        rows = self.receive(mine)[0]
        decision = self.defense.rehearse(rows, self.context("rehearsal"))

        def step(update: Tensor) -> Tensor:
            if nobody_kept(decision):
                return torch.zeros_like(self.start)
            rule, after = copy.deepcopy((self.rule, self.defense.after))
            defense = Pipeline((), self.defense.rule, after)
            return self.step(replace(decision, update=update), rows, rule, defense, "rehearsal")[0] - self.start

        return replace(decision, step=step)


def nobody_kept(decision: Decision) -> bool:
    """Whether a rule has taken nothing of any row: the round is skipped, unless it steps by something else (fltrust's
    own update)."""
    kept, weights = decision.kept, decision.weights
    none = (kept is not None and not bool(kept.any())) or (weights is not None and not bool((weights != 0).any()))
    return none and not bool(decision.update.any())
