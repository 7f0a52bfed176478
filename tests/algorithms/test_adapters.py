"""Ways to average adapters, against products formed in float64."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from fedllm_sec.algorithms.adapters import Alternate, average, by_length, cut
from fedllm_sec.matrix import Layout
from fedllm_sec.matrix.factors import Products
from fedllm_sec.models.lora import scales
from fedllm_sec.models.shifted import Shifted, folded
from fedllm_sec.protocols import Client, Decision, LocalContext
from fedllm_sec.rounds.averaging import Averaging
from fedllm_sec.seeds import generator_for

LAYOUT = Layout(
    ("q.lora_A.w", "q.lora_B.w", "v.lora_A.w", "v.lora_B.w", "head"), ((2, 9), (7, 2), (3, 8), (8, 3), (4,))
)
SCALES = {"q.lora_A.w": 2.0, "v.lora_A.w": 0.5}
WEIGHTS = torch.tensor([0.5, 0.0, 0.2, 0.1], dtype=torch.float64)  # one is rejected, and a fifth is clipped off


def round_of(seed=0):
    rng = generator_for(seed, "adapters")
    start, rows = torch.randn(LAYOUT.size, generator=rng), torch.randn(4, LAYOUT.size, generator=rng)
    rows[1] = float("nan")  # of no weight
    return start, rows, start + (WEIGHTS[[0, 2, 3]].float() @ rows[[0, 2, 3]])


def product(vector, layer):
    parts = LAYOUT.split(vector.double())
    return parts[f"{layer}.lora_B.w"] @ parts[f"{layer}.lora_A.w"]


def mean_product(start, rows, layer):
    change = sum(float(w) * (product(start.double() + row.double(), layer) - product(start, layer))
                 for w, row in zip(WEIGHTS, rows, strict=True) if w)  # fmt: skip
    return product(start, layer) + change


def test_padded_factors_are_averaged_by_the_lengths_of_products_and_a_length_counts_at_most_twice_the_median():
    layout = Layout(("q.lora_A.w", "q.lora_B.w"), ((2, 3), (3, 2)))
    start = torch.zeros(12)
    products = Products.of(layout, start)
    # three clients of rank 1, 1 and 2 with products of length 1, 2 and 30: the last counts as 4
    rows = torch.tensor([
        [1.0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 2.0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 30, 0, 0, 0, 1, 0, 0, 0, 0, 0],
        [float("nan")] * 12,
    ])  # fmt: skip
    w = torch.tensor([0.25, 0.25, 0.25, 0.0], dtype=torch.float64)
    found = by_length(rows, w, products)
    torch.testing.assert_close(found, 0.75 / 7 * torch.tensor([1.0, 2, 4, 0], dtype=torch.float64))
    made = average("pad", torch.full((12,), 9.0), rows, w, products)
    torch.testing.assert_close(made.vector, (found[:3].float() @ rows[:3]))
    a, b = made.vector[:6].view(2, 3).double(), made.vector[6:].view(3, 2).double()
    mean = sum(found[i] * rows[i, 6:].view(3, 2).double() @ rows[i, :6].view(2, 3).double() for i in range(3))
    assert made.gap == pytest.approx(float((mean - b @ a).norm() / mean.norm()), rel=1e-6)
    assert made.gains is None
    nothing = torch.zeros(3, 12)
    assert torch.equal(by_length(nothing, w[:3], products), w[:3])


def test_a_vector_of_factors_by_svd_that_is_cut_holds_the_best_of_the_lower_rank():
    start, rows, vector = round_of()
    products = Products.of(LAYOUT, start, SCALES)
    made = average("svd", vector, rows, WEIGHTS, products)
    lower = cut(products.pairs, made.vector, 1)
    for layer in "qv":
        u, s, v = torch.linalg.svd(product(made.vector, layer))
        torch.testing.assert_close(product(lower, layer), s[0] * u[:, :1] @ v[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(lower[LAYOUT.slices()["head"]], made.vector[LAYOUT.slices()["head"]])
    assert torch.equal(cut(products.pairs, made.vector, 3), made.vector)


def test_exact_and_stack_hold_the_mean_product_to_a_millionth_and_svd_the_best_of_its_rank():
    start, rows, vector = round_of()
    fresh = start.clone()
    for name in ("q.lora_B.w", "v.lora_B.w"):
        fresh[LAYOUT.slices()[name]] = 0
    products = Products.of(LAYOUT, start, SCALES)
    for mode in ("exact", "stack", "svd"):
        made = average(mode, vector, rows, WEIGHTS, products, fresh)
        for number, layer in enumerate("qv"):
            wanted, now = mean_product(start, rows, layer), product(made.vector, layer)
            if mode == "svd":
                assert made.gains is None
                u, s, v = torch.linalg.svd(wanted)
                r = products.pairs[number].rank
                torch.testing.assert_close(now, (u[:, :r] * s[:r]) @ v[:r], rtol=1e-5, atol=1e-5)
                continue
            tall, wide = made.gains[number]
            scale = products.pairs[number].scale
            assert (now + tall @ wide / scale - wanted).norm() <= 1e-6 * wanted.norm()
            assert made.gap == 0
        head = LAYOUT.slices()["head"]
        assert torch.equal(made.vector[head], vector[head])  # what stands beside the factors is averaged as ever
    assert torch.equal(average("stack", vector, rows, WEIGHTS, products, fresh).vector[:18], start[:18])
    assert 0 < average("svd", vector, rows, WEIGHTS, products).gap < 1


def test_no_gauge_of_a_client_changes_the_model_that_exact_or_svd_leaves():
    start, rows, _ = round_of()
    turned = rows.double().clone()
    products = Products.of(LAYOUT, start, SCALES)
    for pair in products.pairs:
        m = torch.randn(pair.rank, pair.rank, generator=generator_for(3), dtype=torch.float64)
        a0, b0 = pair.wide(start[None])[0], pair.tall(start[None])[0]
        a, b = a0 + pair.wide(turned[:1])[0], b0 + pair.tall(turned[:1])[0]
        turned[0, pair.a], turned[0, pair.b] = (m @ a - a0).flatten(), (b @ torch.linalg.inv(m) - b0).flatten()
    for mode in ("exact", "svd"):
        models = []
        for own in (rows.double(), turned):
            vector = start + (WEIGHTS[[0, 2, 3]] @ own[[0, 2, 3]]).float()
            made = average(mode, vector, own, WEIGHTS, products)
            gains = made.gains or [(torch.zeros(1, 1).double(),) * 2] * 2
            held = zip("qv", gains, products.pairs, strict=True)
            models.append([product(made.vector, layer) + t @ w / pair.scale for layer, (t, w), pair in held])
        for one, other in zip(*models, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def adapted():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20))
    made = get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return made


def test_what_a_base_weight_gains_is_in_the_model_in_the_state_and_in_the_saved_adapter(tmp_path):
    model, x = adapted(), torch.randn(5, 30)
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    shifted, plain = Shifted(model, names), model(x)
    low, whole = (torch.randn(40, 3), torch.randn(3, 30)), (torch.randn(20, 25), torch.randn(25, 40))
    shifted.add(names[0], *low)
    shifted.add(names[1], *whole)
    shifted.add(names[1], torch.zeros(20, 2), torch.ones(2, 40))
    assert [len(shifted.parts[name]) for name in names] == [2, 1]  # 25 (20 + 40) numbers are more than 20 x 40
    first, second = model.base_model.model[0], model.base_model.model[1]
    hidden = first(x)
    own = first.base_layer
    assert torch.equal(own(x), torch.nn.functional.linear(x, shifted.published[names[0]] + low[0] @ low[1], own.bias))
    bent = model(x)
    assert not torch.allclose(bent, plain)
    torch.testing.assert_close(second(hidden), bent)

    other = Shifted(fresh := adapted(), names)
    other.load_state_dict(shifted.state_dict())
    assert torch.equal(fresh(x), bent)  # to the bit
    other.load_state_dict({})
    assert torch.equal(fresh(x), plain)

    tensors, config = folded(get_peft_model_state_dict(model), model.peft_config["default"], shifted, scales(model))
    assert config.r == 20  # layer 1 has all 20 singular values; layer 0 needs 2 + 3
    model.peft_config["default"] = config
    torch.manual_seed(0)
    again = get_peft_model(torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 20)), config)
    assert isinstance(again, PeftModel)
    again.load_state_dict(
        {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, strict=False
    )
    torch.testing.assert_close(again(x), bent, rtol=1e-4, atol=1e-4)


def test_a_weight_of_16_bits_is_never_written_to_and_the_layer_gains_all_the_same():
    model, x = adapted(), torch.randn(5, 30)
    own = model.base_model.model[0].base_layer.to(torch.bfloat16)
    shifted = Shifted(model, ["base_model.model.0.lora_A.default.weight"])
    before, weight = own(x.bfloat16()), own.weight.clone()
    low = torch.randn(40, 3), torch.randn(3, 30)
    shifted.add("base_model.model.0.lora_A.default.weight", *low)
    torch.testing.assert_close(own(x.bfloat16()), before + (x.bfloat16().float() @ (low[0] @ low[1]).T).bfloat16())
    assert torch.equal(own.weight, weight)


def test_gains_travel_between_ranks_as_one_vector():
    model = adapted()
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    layout = Layout.of(trained)
    products = Products.of(layout, torch.zeros(layout.size))
    shifted = Shifted(model, names)
    way = Averaging("exact", products.pairs, ((40, 30), (20, 40)), (), torch.zeros(layout.size), shifted)
    gains = [(torch.ones(40, 4), torch.ones(4, 30)), (torch.ones(20, 6), 2 * torch.ones(6, 40))]
    flat = way.packed(gains, 3)
    assert len(flat) == way.width(3) == 10 * (40 + 30 + 20 + 40) + 2
    way.gain(flat, 3)
    assert float((shifted.parts[names[1]][0] @ shifted.parts[names[1]][1])[0, 0]) == 12.0
    way.gain(torch.zeros(way.width(3)), 3)  # a skipped round
    assert shifted.parts[names[0]][0].shape == (40, 4)


def test_alternate_holds_a_still_in_odd_rounds_and_b_in_even_ones_even_under_weight_decay():
    start = torch.arange(LAYOUT.size, dtype=torch.float32)
    rule = Alternate(Products.of(LAYOUT, start).pairs)
    for r, still in ((1, "lora_A"), (2, "lora_B")):
        parameters = torch.nn.Parameter(0.5 * start)
        parameters.grad = torch.ones(LAYOUT.size)
        ctx = LocalContext(Client("0", None), r, start, None, LAYOUT, 1)
        rule.before_step(parameters, 0, ctx)
        rule.after_step(parameters, 0, ctx)
        for name, place in LAYOUT.slices().items():
            held = still in name
            assert bool((parameters.grad[place] == 0).all()) == held
            assert torch.equal(parameters[place].detach(), start[place] * (1.0 if held else 0.5))


def test_a_rule_without_row_weights_cannot_be_averaged_by_products():
    way = Averaging("svd", Products.of(LAYOUT, torch.zeros(LAYOUT.size)).pairs, (), (), torch.zeros(LAYOUT.size))
    with pytest.raises(Exception, match="needs one weight for each row"):
        way.take(torch.zeros(LAYOUT.size), None, Decision(torch.zeros(LAYOUT.size)), torch.zeros(LAYOUT.size), 1.0)
