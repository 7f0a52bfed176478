"""The conformance kit over the whole menu: a new defense is checked the moment it has a menu line."""

import inspect
import math
import re

import pytest
import torch

from fedllm_sec import Decision, aggregate, kernels
from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.conformance import _memory as check_memory
from fedllm_sec.defenses.elsewhere import any_place, sizes
from fedllm_sec.defenses.subject import Subject
from fedllm_sec.errors import FedError
from fedllm_sec.recipe.resolve import settings_of
from fedllm_sec.testing import check_defense

# Settings for the kit's 16 clients, where a name needs some.
SETTINGS = {
    "trimmed_mean": {"f": 2},
    "slsgd": {"f": 2},
    "robust_learning_rate": {"theta": 4},
    "crfl": {"rho": 9.0},
    "backdoor_indicator": {"source": "noise"},
}
# update(rows + t) = update(rows) + t
MOVES_ALONG = {
    "mean", "median", "trimmed_mean", "foundationfl", "krum", "multi_krum", "bulyan", "geometric_median", "rfa", "nnm",
    "bucketing", "residual_reweighting", "meamed", "mda", "caf", "smea",
}  # fmt: skip
# two hostile rows of any size among sixteen leave the update among the honest rows
RESISTS = {
    "median", "trimmed_mean", "foundationfl", "krum", "multi_krum", "bulyan", "geometric_median",
    "residual_reweighting", "meamed", "mda", "caf", "smea", "rflbat",
}  # fmt: skip
ABSOLUTE = {"crfl"}  # works in the units of the global vector
DRAWS = {"weak_dp_client"}
NOISE = {"weak_dp_client", "flame", "crfl", "weak_dp"}


def settings_for(name):
    settings = dict(SETTINGS.get(name, {}))
    f = settings_of(MENU[name].make).get("f")
    return settings | ({"f": 2} if f is not None and f.default is inspect.Parameter.empty else {})


@pytest.mark.parametrize("name", MENU)
def test_a_menu_defense_holds_every_property(name):
    check_defense(
        name,
        settings_for(name),
        scale=name not in ABSOLUTE,
        translation=name in MOVES_ALONG,
        robust=name in RESISTS,
        exact=name not in DRAWS,
        large=name in NOISE,  # of the others below
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("three_sigma", {"reference": "running_mean"}),
        ("three_sigma", {"score": "foolsgold"}),
        ("cross_round", {"compare": "models"}),
        ("fldetector", {"warmup": 1, "window": 1}),
    ],
)
def test_other_memories_are_restored_and_taken_from_another_device_too(name, settings):
    check_memory(Subject(name, settings, "rule", 16))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MENU if name not in NOISE])
def test_a_menu_defense_does_as_well_on_a_million_values_as_on_a_thousand(name):
    sizes(Subject(name, settings_for(name), MENU[name].kind, 16))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("flame", {"noise": 0.001}), ("weak_dp_client", {}), ("weak_dp", {})],
)
def test_the_kit_refuses_noise_that_drowns_a_large_model(name, settings):
    with pytest.raises(AssertionError, match=f"{name}: models of other sizes: .* at d = 1,000,000"):
        sizes(Subject(name, settings | {"absolute": True}, MENU[name].kind, 16))


def norm_filter(updates, ctx, *, factor: float = 2.0):
    """Drop clients whose update is more than `factor` times the median length."""
    norms = kernels.row_norms(updates)
    return Decision.keep(updates, norms <= factor * norms.median())


class Forgetful:
    """A moving average that forgets to put its memory into its state."""

    def __init__(self, *, decay: float = 0.5):
        self.decay, self.memory = decay, None

    def __call__(self, updates, ctx):
        new = kernels.combine(updates, torch.full((updates.n,), 1 / updates.n))
        self.memory = new if self.memory is None else self.decay * self.memory + (1 - self.decay) * new
        return Decision(self.memory)


def overwrites(updates, ctx):
    updates.rows[0].zero_()
    return Decision(updates.rows.float().mean(0))


def reads_the_stored_rows(updates, ctx):
    return Decision(updates.rows.float().mean(0))


def takes_the_first_row(updates, ctx):
    return Decision(next(iter(updates.select([0]).blocks()))[1][0].clone())


def divides_by_the_length(updates, ctx):
    mean = kernels.combine(updates, torch.full((updates.n,), 1 / updates.n))
    return Decision(mean / mean.norm())


class KeepsWhatItIsGiven:
    """A moving average that computes on the CPU with whatever state it was given."""

    def __init__(self):
        self.last = None

    def __call__(self, updates, ctx):
        new = kernels.combine(updates, torch.full((updates.n,), 1 / updates.n)).cpu()
        self.last = new if self.last is None else self.last + new
        return Decision(self.last)

    def state_dict(self):
        return {"last": self.last}

    def load_state_dict(self, state):
        self.last = state["last"]


def draws_from_the_global_generator(updates, ctx):
    return Decision(updates.rows.float().mean(0) + 0.01 * torch.randn(updates.d))


def test_outside_code_is_checked_by_function_and_by_name():
    check_defense(norm_filter, {"factor": 1.5})
    check_defense(f"{__name__}:norm_filter", {"factor": 1.5})


def test_a_rule_of_ones_own_that_reads_the_stored_rows_sees_those_that_count_and_no_others():
    check_defense(reads_the_stored_rows)
    rows = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [3.0, 4.0]])
    with pytest.warns(UserWarning, match="1 of 3 rows are set aside"):
        assert aggregate(rows, reads_the_stored_rows).update.tolist() == [2.0, 3.0]
    bucketed = aggregate(rows[::2], reads_the_stored_rows, before=("bucketing", {"s": 2}))
    assert bucketed.update.tolist() == [2.0, 3.0]


def takes_a_row_by_its_place(updates, ctx):
    return Decision(0.5 * updates.rows[0].float())


def test_a_rule_that_takes_a_row_by_its_place_is_none():
    with pytest.raises(AssertionError, match="takes_a_row_by_its_place: permutation"):
        check_defense(takes_a_row_by_its_place)
    with pytest.raises(AssertionError, match="every row counts: in any order of the rows the update is the one at"):
        any_place(Subject(takes_a_row_by_its_place, {}, "rule", 16))
    with pytest.raises(AssertionError, match="few clients: raised IndexError: index 3 is out of bounds"):
        check_defense(lambda updates, ctx: Decision(updates.rows[3].float()))


class NeedsMore:
    def __init__(self, more: int) -> None: ...


@pytest.mark.parametrize(
    ("defense", "more", "said"),
    [
        (3, {}, "check_defense: 3 is no defense. Give a name of the menu"),
        ("medain", {}, 'check_defense.name: there is no "medain". Did you mean "median"?'),
        (reads_the_stored_rows, {"kind": "rules"}, "check_defense: kind='rules'. Did you mean \"rule\"?"),
        (lambda: 1, {}, "<lambda>: cannot be called with (updates, ctx)"),
        (NeedsMore, {}, "cannot be made with these settings (TypeError: "),
        ("krum", {"settings": [1, 2]}, "check_defense: settings=[1, 2]: must be a mapping"),
        ("mean", {"clients": 1}, "check_defense: clients=1: must be a whole number of at least 4"),
    ],
)
def test_what_is_no_defense_is_told_as_such(defense, more, said):
    with pytest.raises(FedError, match=re.escape(said)):
        check_defense(defense, **more)


@pytest.mark.parametrize(
    ("broken", "property_"),
    [
        (Forgetful, "state_dict"),
        (KeepsWhatItIsGiven, "a state loaded from an accelerator: .* put tensors where the rule computes"),
        (overwrites, "inputs unchanged"),
        (takes_the_first_row, r"chunks: raised DefenseError: takes_the_first_row: gave back an update of shape \(1,\)"),
        (divides_by_the_length, "finite|rows times|zero"),
        (draws_from_the_global_generator, "determinism"),
    ],
)
def test_the_kit_names_the_property_that_fails(broken, property_):
    with pytest.raises(AssertionError, match=property_):
        check_defense(broken)
