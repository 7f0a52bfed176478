"""Cores between fixed outer factors: their mean is that of the products, and so are their lengths and angles."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedllm_sec.errors import RecipeError
from fedllm_sec.models.cores import give_cores, leading
from fedllm_sec.seeds import generator_for


def adapted(*layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = torch.nn.Sequential(*(layer() for layer in layers))
        return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["0"]))


def test_a_mean_of_cores_on_a_layer_of_smollm2_is_the_mean_product_and_cores_have_the_geometry_of_products():
    model = adapted(lambda: torch.nn.Linear(576, 1536))  # gate_proj of SmolLM2-135M
    give_cores(model)
    (core,) = [p for p in model.parameters() if p.requires_grad]
    assert core.shape == (16, 16)
    assert not core.any()
    layer = model.base_model.model[0]
    tall, wide = layer.lora_B["default"].parametrizations.weight[0].outer, layer.lora_A["default"].weight
    cores = torch.randn(5, 16, 16, generator=generator_for(0, "cores"))
    w = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=torch.float64)
    products = torch.stack([2.0 * tall.double() @ one.double() @ wide.double() for one in cores])
    with torch.no_grad():
        core.copy_((w.float()[:, None, None] * cores).sum(0))
        held = 2.0 * layer.lora_B["default"].weight.double() @ wide.double()
    wanted = (w[:, None, None] * products).sum(0)
    assert (held - wanted).norm() <= 1e-6 * wanted.norm()
    flat, small = products.flatten(1), cores.double().flatten(1)
    torch.testing.assert_close(flat @ flat.T, 4.0 * small @ small.T, rtol=1e-5, atol=1e-3)


def test_outer_factors_are_the_leading_singular_vectors_and_the_same_again():
    u, _ = torch.linalg.qr(torch.randn(40, 20, generator=generator_for(1, "u")))
    v, _ = torch.linalg.qr(torch.randn(30, 20, generator=generator_for(1, "v")))
    weight = (u * torch.logspace(2, -2, 20)) @ v.T
    left, right = leading(weight, 3)
    torch.testing.assert_close((left.T @ u[:, :3]).abs(), torch.eye(3), rtol=0, atol=1e-3)
    torch.testing.assert_close((right @ v[:, :3]).abs(), torch.eye(3), rtol=0, atol=1e-3)
    assert all(map(torch.equal, leading(weight, 3), (left, right)))


def test_a_layer_without_singular_vectors_is_an_error():
    with pytest.raises(RecipeError, match=r"model.lora.average: core: .* is no linear layer.*Leave it out"):
        give_cores(adapted(lambda: torch.nn.Embedding(9, 32)))
