"""Every update attack as a run calls it: through the threat, on an update matrix with ids."""

import copy
import warnings

import pytest
import torch

from fedllm_sec.attacks import MENU, NOT_FINITE, needs
from fedllm_sec.attacks.threat import Threat
from fedllm_sec.errors import AttackError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.protocols import Decision
from fedllm_sec.recipe.resolve import resolve
from fedllm_sec.seeds import generator_for

LAYOUT = Layout(("q.lora_A.default.weight", "q.lora_B.default.weight"), ((4, 30), (20, 4)))
UPDATE = [name for name, entry in MENU.items() if entry.kind == "update"]


def matrix(dtype=torch.float32):
    rows = (torch.randn(7, LAYOUT.size, generator=generator_for(0, "rows")) * 1e-3).to(dtype)
    return UpdateMatrix.of(rows, ids=[f"c{i}" for i in range(7)], counts=[3.0] * 7, layout=LAYOUT)


def threat(*names, knowledge=None):
    made = [resolve(name, {}, MENU, "attack.update.0") for name in names]
    level = knowledge or needs(names[0], {})
    return Threat(malicious=frozenset({"c1", "c5"}), seed=3, knowledge=level, update=made)


def forge(attackers, updates, round=2):
    start = torch.zeros(LAYOUT.size) + 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attackers.forge(
            updates,
            vector=start,
            last_update=torch.ones(LAYOUT.size) * 1e-4,
            round=round,
            defense=lambda guess: Decision(guess.rows.float().mean(0)),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UPDATE)
def test_each_attack_submits_rows_in_its_clients_places(name, dtype):
    updates = matrix(dtype)
    before = updates.rows.clone()
    places, rows = forge(threat(name), updates)
    assert places == [1, 5]
    assert rows.shape == (2, LAYOUT.size)
    assert rows.dtype == dtype
    assert torch.equal(updates.rows, before)
    assert bool(torch.isfinite(rows).all()) is (name not in NOT_FINITE)


@pytest.mark.parametrize("name", UPDATE)
def test_a_resumed_attack_goes_on_as_the_uninterrupted_one(name):
    straight, stopped = threat(name), threat(name)
    for attackers in (straight, stopped):
        forge(attackers, matrix(), round=1)
    resumed = threat(name)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    one, two = (forge(attackers, matrix(), round=2)[1] for attackers in (straight, resumed))
    assert torch.equal(one.nan_to_num(1.0), two.nan_to_num(1.0))


def test_attacks_in_a_list_act_one_after_the_other():
    _, scaled = forge(threat("model_replacement"), matrix())
    _, both = forge(threat("model_replacement", "byzantine_flip"), matrix())
    torch.testing.assert_close(both, -scaled)


def test_a_threat_that_grants_less_than_an_attack_needs_says_so():
    with pytest.raises(AttackError, match=r"attack\.knowledge"):
        forge(threat("min_max", knowledge="own"), matrix())
