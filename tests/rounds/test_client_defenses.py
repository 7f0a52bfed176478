"""Defenses that clients run on themselves, from the recipe into the rows that are sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm_sec.build.names import checked
from fedllm_sec.build.plan import planned
from fedllm_sec.errors import RecipeError
from fedllm_sec.rounds.federation import run
from tests.first_round import made, rows_of

DIGITS: dict[str, Any] = {
    "seed": 1,
    "rounds": 1,
    "task": "classify",
    "model": {"name": "lenet"},
    "data": {"name": "digits", "train_rows": 200},
    "clients": {"total": 4, "local_steps": 3, "batch_size": 10, "lr": 1e-3, "weight_decay": 0.1},
    "compute": {"threads": 1},
}
FLIP = {"malicious": {"ids": [0]}, "update": [{"name": "byzantine_flip"}]}


def guarded(*client: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**DIGITS, "enable_defense": True, "defense": {"client": list(client)}, **changes}


def test_soteria_sends_no_change_of_the_masked_features_weights(monkeypatch):
    share = 0.25
    fed, rows = rows_of(guarded({"name": "soteria", "share": share}), monkeypatch)
    for client, row in zip(fed.clients, rows, strict=True):
        still = (fed.task.layout.split(row)["fc3.weight"] == 0).all(0)  # (84,)
        fed.task.parameters.data.copy_(fed.task.initial)
        with torch.no_grad():
            live = int((fed.guards[0].representation(client.shard)[1] > 0).any(0).sum())
        assert int(still.sum()) >= round(share * live) >= 1
        assert not still.all()
    _, plain = rows_of(DIGITS, monkeypatch)
    assert int((fed.task.layout.split(plain[0])["fc3.weight"] == 0).all(0).sum()) == 0  # weight decay moves them all


def test_wbc_changes_what_clients_send_and_attackers_do_not_run_it(monkeypatch):
    _, plain = rows_of(DIGITS, monkeypatch)
    _, guarded_rows = rows_of(guarded({"name": "wbc"}), monkeypatch)
    _, attacked = rows_of(guarded({"name": "wbc"}, enable_attack=True, attack=FLIP), monkeypatch)
    assert [torch.equal(a, b) for a, b in zip(plain, guarded_rows, strict=True)] == [False] * 4
    assert torch.equal(attacked[0], plain[0])
    assert torch.equal(attacked[1:], guarded_rows[1:])


def test_a_client_defense_that_is_switched_off_changes_nothing(monkeypatch):
    _, plain = rows_of(DIGITS, monkeypatch)
    _, off = rows_of({**guarded({"name": "wbc"}), "enable_defense": False}, monkeypatch)
    assert torch.equal(plain, off)


def test_the_servers_own_update_is_trained_without_it():
    defense = {"client": [{"name": "wbc"}], "rule": {"name": "fltrust"}, "root_rows": 20}
    ends = [
        made({**DIGITS, "enable_defense": True, "defense": block}) for block in (defense, {**defense, "client": []})
    ]
    deltas = []
    for fed in ends:
        seen = []
        decide = fed.defense.decide
        fed.defense.decide = lambda rows, ctx, decide=decide, seen=seen: (
            seen.append(ctx.root_update),
            decide(rows, ctx),
        )[1]
        list(run(fed, 1))
        deltas.append(seen[0])
    assert torch.equal(*deltas)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (guarded({"name": "wcb"}), r'defense.client.0.name: there is no "wcb". Did you mean "wbc"'),
        (guarded({"name": "median"}), 'there is no "median"'),
        (guarded({"name": "wbc", "strenght": 1.0}), 'Did you mean "strength"'),
        (guarded({"name": "wbc", "strength": 0.0}), "wbc: needs strength > 0"),
        (guarded({"name": "soteria", "rows": 0}), "soteria: needs rows >= 1"),
        (
            {
                **guarded({"name": "soteria"}, task="next_char", model={"name": "lstm"}),
                "data": {"name": "LICENSE"},
            },
            "soteria is of kind 'client_image' and cannot stand here. Fitting: int8, prune",
        ),
    ],
)
def test_a_mistake_is_named_before_any_data_are_read(raw, words):
    with pytest.raises(RecipeError, match=words):
        planned(checked(raw))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (guarded({"name": "soteria", "layer": "fc9"}), r'no linear layer "fc9". Did you mean "fc'),
        (guarded({"name": "soteria"}, model={"name": "logistic"}), '"1" is the first layer of the model'),
        (
            guarded({"name": "wbc"}, clients={**DIGITS["clients"], "local_steps": 1}),
            "no client takes more than one",
        ),
        (
            guarded(
                {"name": "wbc"},
                algorithm={"name": "fedsgd"},
                clients={"total": 4, "local_steps": 1, "optimizer": "sgd", "lr": 0.1, "max_grad_norm": None},
            ),
            "no client takes more than one",
        ),
    ],
)
def test_a_client_defense_that_cannot_act_is_an_error_before_training(raw, words):
    with pytest.raises(RecipeError, match=words):
        made(raw)


def test_client_defenses_are_on_the_menu(capsys):
    from fedllm_sec import menu

    assert menu.main(["wbc", "soteria"]) == 0
    shown = capsys.readouterr().out
    assert "defense.client, kind client_image" in shown
    assert "share: float = 0.1" in shown
