"""Rules that compare products B A cannot be fooled by the gauge; rules that compare factors can."""

from dataclasses import replace

import pytest
import torch

from fedllm_sec import kernels
from fedllm_sec.defenses import MENU
from fedllm_sec.defenses.layers import LayerByLayer
from fedllm_sec.defenses.pipeline import Pipeline
from fedllm_sec.defenses.space import Space
from fedllm_sec.defenses.subject import LAYOUT, Subject
from fedllm_sec.errors import DefenseError
from fedllm_sec.matrix import Layout, UpdateMatrix
from fedllm_sec.matrix.factors import Products, aligned
from fedllm_sec.seeds import generator_for
from tests.defenses.test_menu_conformance import settings_for

SCALES = {"layers.0.q.lora_A": 2.0, "layers.1.q.lora_A": 0.5}
READ_COLUMNS = {
    "median", "trimmed_mean", "foundationfl", "slsgd", "robust_learning_rate", "bulyan", "residual_reweighting",
    "meamed", "lasa", "alignins", "deepsight", "fldetector", "signguard", "freqfed", "cross_round", "weak_dp_client",
    "horus",
}  # fmt: skip
LOOK_AT_NOTHING = {"mean", "bucketing"}  # their weights do not depend on what the rows hold
# what an adapter makes of images is the same in any gauge; the kit's model is no adapter's
JUDGE_MODELS = {"flare", "backdoor_indicator"}
OTHERS = READ_COLUMNS | JUDGE_MODELS
ROWS = [name for name, entry in MENU.items() if entry.kind != "after" and name not in OTHERS]


def gauged(updates, start, clients, seed=0, condition=10.0, alike=False):
    """The same products of some clients in another random gauge, M = Q diag(1 .. condition) R, in float64."""
    rows, rng = updates.rows.double().clone(), generator_for(seed, "gauge")
    for pair in Products.of(updates.layout, start).pairs:
        a0, b0 = pair.wide(start[None]), pair.tall(start[None])
        for i in clients:
            q, r = (torch.linalg.qr(torch.randn(2, 2, generator=rng, dtype=torch.float64))[0] for _ in range(2))
            m = q @ torch.diag(torch.tensor([1.0, condition], dtype=torch.float64)) @ r
            a, b = a0 + pair.wide(rows[i : i + 1]), b0 + pair.tall(rows[i : i + 1])
            rows[i, pair.a], rows[i, pair.b] = (m @ a - a0).flatten(), (b @ torch.linalg.inv(m) - b0).flatten()
    return replace(updates, rows=rows if alike else rows.to(updates.rows.dtype))


def decided(name, updates, enter, **changed):
    """Two rounds, for what rules remember, and the decision on the second."""
    settings = settings_for(name) | ({"noise": 0.0} if name == "flame" else {}) | changed
    subject = Subject(name, settings, MENU[name].kind, 16)
    made = subject.make()
    pipeline = Pipeline(made.before, made.rule, (), enter)
    with kernels.in_torch():
        pipeline.decide(subject.data(round=2), subject.context(round=2))
        return pipeline.decide(updates, subject.context())


def differ(one, other):
    """The largest difference of weights, of kept, and of scores relative to the largest."""
    found = [0.0]
    for what in ("weights", "kept", "scores"):
        x, y = getattr(one, what), getattr(other, what)
        if x is not None:
            size = float(x.double().abs().max().clamp_min(1e-300)) if what == "scores" else 1.0
            found.append(float((x.double() - y.double()).abs().max()) / size)
    return max(found)


@pytest.fixture(scope="module")
def sent():
    subject = Subject("mean", {}, "rule", 16)
    updates, start = subject.data(), subject.context().global_vector
    rows = torch.cat([updates.rows[:14], 3.0 - 2.0 * updates.rows[14:]])  # two that stand out
    return replace(updates, rows=rows.double()), start


@pytest.mark.parametrize("name", ROWS)
def test_no_gauge_of_three_clients_changes_a_decision_in_product_space_and_one_does_in_factor_space(name, sent):
    updates, start = sent
    space = Space("product", SCALES)
    straight = decided(name, updates, space)
    assert differ(straight, decided(name, gauged(updates, start, (0, 3, 15), alike=True), space)) <= 1e-6
    as_sent = replace(updates, rows=updates.rows.float())
    narrow = gauged(as_sent, start, (0, 3, 15), condition=100.0)
    assert differ(decided(name, as_sent, space), decided(name, narrow, space)) <= 1e-4
    fooled = differ(decided(name, as_sent, None), decided(name, gauged(as_sent, start, (0, 3, 15)), None))
    assert fooled > 1e-2 or name in LOOK_AT_NOTHING


@pytest.mark.parametrize("name", sorted(READ_COLUMNS))
def test_a_rule_that_reads_columns_says_why_it_cannot_in_product_space_and_works_where_rows_are_aligned(name, sent):
    updates = replace(sent[0], rows=sent[0].rows.float())
    with pytest.raises(DefenseError, match=r"reads single coordinates.*B A are never formed"):
        decided(name, updates, Space("product"))
    assert decided(name, updates, Space("aligned", SCALES)).update.shape == (updates.d,)


def test_product_geometry_is_that_of_the_products_formed_in_float64():
    subject = Subject("mean", {}, "rule", 16)
    updates, start, extra = subject.data(), subject.context().global_vector, subject.context().root_update
    rows = torch.cat([updates.rows, extra[None]])
    products = Products.of(LAYOUT, start, SCALES)
    formed = []
    for row in rows:
        parts, origin = LAYOUT.split((start + row).double()), LAYOUT.split(start.double())
        layers = [
            SCALES[f"{layer}.lora_A"]
            * (
                parts[f"{layer}.lora_B"] @ parts[f"{layer}.lora_A"]
                - origin[f"{layer}.lora_B"] @ origin[f"{layer}.lora_A"]
            )
            for layer in ("layers.0.q", "layers.1.q")
        ]
        formed.append(torch.cat([*(layer.flatten() for layer in layers), row[LAYOUT.slices()["head.weight"]].double(),
                                 row[LAYOUT.slices()["head.bias"]].double()]))  # fmt: skip
    wanted = torch.stack(formed)
    shown = replace(updates, products=products)
    found = kernels.geometry(shown, extra)
    torch.testing.assert_close(found.gram, wanted @ wanted.T, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found.sq_distances, torch.cdist(wanted, wanted).square(), rtol=1e-5, atol=1e-5)
    w = torch.tensor([[0.5, 0.5] + [0.0] * 14, [0.0] * 15 + [2.0]], dtype=torch.float64)  # mixes mix the products
    mixed = w @ wanted[:-1]
    torch.testing.assert_close(kernels.gram(shown.mix(w)), mixed @ mixed.T, rtol=1e-6, atol=1e-5)
    assert torch.equal(kernels.combine(shown, torch.ones(16)), kernels.combine(updates, torch.ones(16)))
    twice = shown.select([3, 3])
    assert kernels.sq_distances(twice).tolist() == [[0, 0], [0, 0]]


def test_history_in_product_space_is_the_sum_of_products_over_rounds_and_is_restored():
    subject = Subject("foolsgold", {}, "rule", 16)
    layout = Layout(LAYOUT.names[:4], LAYOUT.shapes[:4])
    start, total = torch.randn(layout.size, generator=generator_for(1)), torch.zeros(4, 60, dtype=torch.float64)
    rule = subject.make().rule
    for r in range(3):
        rows = torch.randn(4, layout.size, generator=generator_for(2, r))
        shown = replace(UpdateMatrix.of(rows, layout=layout), products=Products.of(layout, start))
        for i, row in enumerate(rows):
            new, old = layout.split(start.double() + row.double()), layout.split(start.double())
            total[i] += torch.cat([(new[f"layers.{k}.q.lora_B"] @ new[f"layers.{k}.q.lora_A"]
                                    - old[f"layers.{k}.q.lora_B"] @ old[f"layers.{k}.q.lora_A"]).flatten()
                                   for k in (0, 1)])  # fmt: skip
        if r == 1:
            fresh = subject.make().rule
            fresh.load_state_dict(rule.state_dict())
            restored = fresh.history.add(shown)
        gram = rule.history.add(shown)
        if r == 0:  # one round's products are of rank 4, which is kept
            torch.testing.assert_close(gram, total @ total.T)
        if r == 1:
            torch.testing.assert_close(gram, restored)
    # later sums have five singular values, the smallest of which is left out
    assert (gram - total @ total.T).norm() / gram.norm() < 0.05


def test_aligned_rows_of_clients_with_one_product_are_one_row_and_keep_the_product():
    subject = Subject("mean", {}, "rule", 4)
    updates, start = subject.data(), subject.context().global_vector
    products = Products.of(LAYOUT, start)
    turned = gauged(replace(updates, rows=updates.rows.double()), start, range(16)[:4], condition=30.0, alike=True)
    rows, left = aligned(updates.rows, products)
    again, _ = aligned(turned.rows, products)
    assert left == 0
    torch.testing.assert_close(rows, again, rtol=1e-3, atol=1e-3)
    products_of = [kernels.gram(replace(updates, rows=r, products=products)) for r in (updates.rows, rows)]
    torch.testing.assert_close(*products_of, rtol=1e-4, atol=1e-4)
    lost = updates.rows.clone()
    lost[0, LAYOUT.slices()["layers.0.q.lora_A"]] = -start[LAYOUT.slices()["layers.0.q.lora_A"]]  # A = 0: no gauge
    kept, left = aligned(lost, products)
    assert left == 1
    assert torch.equal(kept[0, :22], lost[0, :22])


def test_layer_by_layer_drops_the_client_that_is_odd_in_one_layer_there_alone():
    subject = Subject("krum", {"f": 1}, "rule", 6)
    updates = subject.data()
    rows = updates.rows.clone()
    odd = LAYOUT.slices()["layers.1.q.lora_B"]
    rows[2, odd] += 50.0
    made = Subject("multi_krum", {"f": 1}, "rule", 6).make()
    layered = LayerByLayer(made.before, made.rule, (), Space("product"))
    decision = layered.decide(replace(updates, rows=rows), subject.context())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(decision.update[odd], rows[others][:, odd].mean(0))
    assert decision.weights is None
    assert decision.scores.argmax() == 2
    again = LayerByLayer(made.before, made.rule, (), Space("product"))
    again.load_state_dict(layered.state_dict())
    assert set(again.layers) == {"layers.0.q.lora_A", "layers.1.q.lora_A", "beside"}


def test_rows_without_a_pair_of_factors_have_no_products():
    layout = Layout(("q.lora_B.weight",), ((4, 2),))
    with pytest.raises(DefenseError, match=r"no pair .* is trained among 1 parameters"):
        Products.of(layout, torch.zeros(8))
