"""A round tried on random rows before anything is trained: what defense and attack cannot do is said at once."""

from __future__ import annotations

import contextlib
import sysconfig
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from fedllm_sec import kernels
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.build.space import PAIRED
from fedllm_sec.defenses.before import bucketing
from fedllm_sec.defenses.columns import mean
from fedllm_sec.defenses.pipeline import Pipeline, name_of
from fedllm_sec.defenses.privacy import settings_if
from fedllm_sec.defenses.subject import EXAMPLES, PLANTED, StandIn
from fedllm_sec.errors import AttackError, DefenseError, IdleAttack
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision, RoundContext
from fedllm_sec.rounds.averaging import needs_weights
from fedllm_sec.seeds import generator_for

HERE = Path(__file__).resolve().parents[1]
MOST = 8  # of a parameter's sizes
MOST_ROWS = 128  # that are tried out: what some rules make of more takes seconds, and n x n numbers do not fit for ever
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
    images: bool  # whether the server's model is a classifier of images
    layout: Layout = UNNAMED
    weighs: str | None = None  # the way of averaging adapters that needs row weights
    code: bool = False  # whether a method of attack or defense is named as package.module:name

    def problems(self, defense: Pipeline, threat: Threat | None) -> list[str]:
        """What goes wrong. Both are used up: make others for the run."""
        found = []
        with warnings.catch_warnings(record=True) as said, kernels.in_torch():  # random rows are no reason to warn
            warnings.simplefilter("always")
            for place, act in (("defense", self._defend), ("attack", self._forge)):
                try:
                    act(defense, threat)
                except (AttackError, DefenseError) as error:
                    if self.layout not in (UNNAMED, PAIRED) or not any(word in str(error) for word in NAMES):
                        found.append(f"{place}: {error}")
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a method from outside may raise anything
                    if not (self.code or outside_frames(error)):
                        raise
                    found.append(f"{place}: {_told(error, threat.start if place == 'attack' and threat else 1)}")
        if len(self.ids) == self.total:  # then every round has this cohort
            found += [str(warning.message) for warning in said if issubclass(warning.category, IdleAttack)]
        return found

    @property
    def note(self) -> str | None:
        """What is not tried out, where a round has too many clients."""
        if len(self.ids) <= MOST_ROWS:
            return None
        return (
            f"a round of {len(self.ids):,} clients is not rehearsed: whether the defense can work with so many was "
            f"checked, not what it does with rows; an attack, if there is one, is tried among {MOST_ROWS} clients and "
            "a plain mean."
        )

    def _rows(self) -> UpdateMatrix:
        rng, ids = generator_for(self.seed, "rehearsal"), self.ids[:MOST_ROWS]
        return UpdateMatrix.of(torch.randn(len(ids), self.layout.size, generator=rng), ids=ids, layout=self.layout)

    def _context(self, rows: UpdateMatrix) -> RoundContext:
        return RoundContext(
            round=1,
            global_vector=torch.zeros(rows.d),
            layout=rows.layout,
            rng=generator_for(self.seed, "rehearsal", "defense"),
            rounds=self.rounds,
            root_update=rows.rows[0] if self.root else None,
            root_rows=EXAMPLES if self.root else None,
            classifier=StandIn() if self.images else None,  # type: ignore[arg-type]
            indicator=PLANTED if self.images else None,
        )

    def _defend(self, defense: Pipeline, threat: Threat | None) -> None:
        rows = self._rows()
        context = self._context(rows)
        if len(self.ids) > MOST_ROWS:
            only_counted(defense, self.ids, context)
            update = torch.zeros(rows.d)
        else:
            decision = defense.decide(rows, context)
            update = decision.update
            if self.weighs is not None and decision.weights is None:
                raise DefenseError(f"{name_of(defense.rule)}: {needs_weights(self.weighs)}")
        defense.finish(update, self._context(rows))

    def _forge(self, defense: Pipeline, threat: Threat | None) -> None:
        """As many attackers as a round has on average, in a round of the attack."""
        if threat is None or not threat.malicious:
            return
        rows = self._rows()
        m = round((threat.redrawn or len(threat.malicious)) * rows.n / self.total)
        m = min(max(m, 1), max(rows.n - 1, 1))
        threat.malicious, threat.redrawn, threat.probability = frozenset(self.ids[:m]), None, 1.0
        if len(self.ids) > MOST_ROWS:  # whose settings are made for other numbers of rows
            defense = Pipeline((), mean)

        def try_it(guess: UpdateMatrix) -> Decision:
            return replace(defense.rehearse(guess, self._context(guess)), step=lambda update: update)

        vector = torch.zeros(rows.d)
        before = None if threat.start == 1 else rows.rows[-1]  # the first round has no step before it
        threat.forge(rows, vector=vector, last_update=before, round=threat.start, defense=try_it)


class _LookedAt(Exception):
    """A stage has begun to work with the rows."""


class _Unread:
    """Rows of which is known only whose they are: looking at them ends the try, before anything of size n x n is."""

    def __init__(self, ids: Sequence[str], layout: Layout) -> None:
        self.ids, self.counts, self.layout = tuple(ids), (1.0,) * len(ids), layout
        self.n, self.d = len(ids), layout.size

    def __getattr__(self, name: str) -> Any:
        raise _LookedAt(name)


def only_counted(defense: Pipeline, ids: Sequence[str], ctx: RoundContext) -> None:
    """What the stages and the rule ask of the number and the names of the rows, which they do before anything else."""
    rows: Any = _Unread(ids, ctx.layout)
    for stage in (*defense.before, defense.rule):
        if (buckets := settings_if(stage, bucketing)) is not None:
            groups = -(-rows.n // max(1, buckets.get("s", 2)))
            rows = _Unread([f"bucket{i}" for i in range(groups)], ctx.layout)
            continue
        # on "meta", what a stage makes room for takes none; drawing numbers there is a RuntimeError
        with contextlib.suppress(_LookedAt, RuntimeError), torch.device("meta"):
            stage(rows, ctx)


def outside_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Where it passed through code that is neither fedllm_sec's nor a library's."""
    ours = (HERE, Path(sysconfig.get_path("stdlib")), *(Path(library.__file__).parent for library in (torch, numpy)))

    def known(file: str) -> bool:
        outside = "site-packages" in file or "dist-packages" in file  # both may lie in the standard library's folder
        if file.startswith("<"):  # what Python or a library has made itself
            return True
        return any(Path(file).is_relative_to(p) and (not outside or p != ours[1]) for p in ours)

    return [frame for frame in traceback.extract_tb(error.__traceback__) if not known(frame.filename)]


def _told(error: BaseException, round: int) -> str:
    """What a method from outside raised, where, and what is not there in the first round, in a line."""
    where = place_of((outside_frames(error) or traceback.extract_tb(error.__traceback__))[-1])
    missed = round == 1 and "NoneType" in str(error)
    first = " In the first round there is no last_update: it is None." if missed else ""
    return f"in a rehearsed round {round}: {type(error).__name__}: {error} ({where}).{first}"


def place_of(frame: traceback.FrameSummary) -> str:
    """File, line and function, in words."""
    return f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"


def scaled_down(layout: Layout) -> Layout:
    """The same names with small shapes, which still fit each other."""
    return Layout(layout.names, tuple(tuple(min(size, MOST) for size in shape) for shape in layout.shapes))
