"""What gradients and deltas give away: attacks on a few pixels, with numbers a person can check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedllm_sec
from fedllm_sec.attacks import PRIVACY_MENU
from fedllm_sec.attacks.privacy.exclusive import exclusive_neurons, fed_rows
from fedllm_sec.attacks.privacy.gradients import gradient_of
from fedllm_sec.attacks.privacy.inversion import invert_gradient
from fedllm_sec.attacks.privacy.labels import rounded
from fedllm_sec.attacks.privacy.reveal import reveal
from fedllm_sec.attacks.privacy.seen import Observation, as_gradient
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.images import matched, psnr
from fedllm_sec.matrix import Layout
from fedllm_sec.models import MENU
from fedllm_sec.protocols import Labelled, LocalTraining
from fedllm_sec.seeds import generator_for

SGD = LocalTraining(batch_size=2, steps=2, optimizer="sgd", lr=0.1, max_grad_norm=None)


def net(name: str = "sigmoid_cnn", shape: tuple[int, ...] = (1, 8, 8), classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = MENU[name].make(shape, classes)
    return made


def batch(n: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 8, 8, generator=rng), torch.randint(classes, (n,), generator=rng)


def gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    slope = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), slope, strict=True))


def seen(model: nn.Module, x: torch.Tensor, y: torch.Tensor, training: LocalTraining | None = None) -> Observation:
    """The gradient, or with `training` the delta of one epoch of SGD over the rows."""
    layout = Layout.of(model.named_parameters())
    start = layout.join({n: p.detach() for n, p in model.named_parameters()})
    if training is None:
        sent = layout.join(gradient(model, x, y))
        return Observation(sent, "gradient", start, layout, model, tuple(x.shape[1:]), rows=len(y))
    own = [p.detach().clone() for p in model.parameters()]
    size = training.batch_size or len(y)
    for here in range(0, len(y), size):
        slope = gradient(model, x[here : here + size], y[here : here + size])
        with torch.no_grad():
            for p, g in zip(model.parameters(), slope.values(), strict=True):
                p -= training.lr * g
    sent = layout.join({n: p.detach() for n, p in model.named_parameters()}) - start
    with torch.no_grad():
        for p, old in zip(model.parameters(), own, strict=True):
            p.copy_(old)
    return Observation(
        sent, "delta", start, layout, model, tuple(x.shape[1:]), rows=size, steps=len(y) // size, size=len(y),
        training=training,
    )  # fmt: skip


def adam(model: nn.Module, x: torch.Tensor, y: torch.Tensor, given: Observation) -> torch.Tensor:
    """The delta of two steps of 8 rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for here in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[here]), y[here]).backward()
        optimizer.step()
    sent = given.layout.join({n: p.detach().clone() for n, p in model.named_parameters()}) - given.start
    with torch.no_grad():
        for name, values in given.layout.split(given.start).items():
            model.get_parameter(name).copy_(values)
    return sent


def test_a_linear_layer_gives_its_input_away_exactly():
    model, (x, y) = net("logistic"), batch(1)
    made = fedllm_sec.reconstruct(gradient(model, x, y), model, (1, 1, 8, 8), "linear_layer")
    assert torch.allclose(made.inputs, x, atol=1e-5)
    assert made.labels.tolist() == y.tolist()


def test_the_input_is_told_as_it_was_before_it_was_normalised():
    model, (x, y) = net("logistic"), batch(1)
    mean, std = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.2)
    given = seen(model, (x - mean) / std, y)
    made = PRIVACY_MENU["linear_layer"].make(replace(given, mean=mean, std=std))
    assert torch.allclose(made.inputs, x, atol=1e-5)


@pytest.mark.parametrize("method", ["dlg", "idlg"])
def test_deep_leakage_finds_the_one_image_and_its_label(method: str):
    model, (x, y) = net(), batch(1)
    flat = torch.cat([g.flatten() for g in gradient(model, x, y).values()]).numpy()
    before = [p.detach().clone() for p in model.parameters()]
    made = fedllm_sec.reconstruct(flat, model, (1, 1, 8, 8), method, iterations=100, restarts=1)
    assert float(psnr(made.inputs, x)) > 40
    assert made.labels.tolist() == y.tolist()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_through_fused_attention_is_differentiable():
    class Attends(nn.Linear):  # ten classes of an image's three lines
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = super().forward(x)
            return nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2))

    network, label = Attends(4, 10).double(), torch.tensor([3])
    x = torch.rand(1, 1, 3, 4, dtype=torch.float64, generator=generator_for(1, "x")).requires_grad_()

    def length(x: torch.Tensor) -> torch.Tensor:
        return gradient_of(network, ["weight"], x, label)[0].square().sum()

    (slope,) = torch.autograd.grad(length(x), x)
    step = 1e-5 * slope
    assert float(length(x + step) - length(x - step)) == pytest.approx(2e-5 * float(slope.square().sum()), rel=1e-6)


def test_inverting_finds_two_images_from_a_gradient_whose_length_was_cut():
    """And the same seed gives the same images."""
    model, ramp = net(), torch.linspace(0.1, 0.9, 8)
    x = torch.stack([ramp.expand(1, 8, 8), 1 - ramp[:, None].expand(1, 8, 8)])
    y = torch.tensor([1, 2])
    scaled = {name: 0.01 * g for name, g in gradient(model, x, y).items()}
    made, again = (
        fedllm_sec.reconstruct(scaled, model, (2, 1, 8, 8), labels=y, iterations=120, seed=3) for _ in range(2)
    )
    assert torch.equal(made.inputs, again.inputs)
    assert made.loss < 0.05
    assert min(matched(made.inputs, x).psnr) > 18


def test_the_delta_of_two_steps_is_unrolled():
    """The truth has no distance left: the unrolled delta is the client's own."""
    from fedllm_sec.attacks.privacy.gradients import cosine_distance, unrolled_delta

    model, (x, y) = net(), batch(4)
    given = seen(model, x, y, SGD)
    made = unrolled_delta(given, given.network(), x, y)
    assert float(cosine_distance(made, list(given.parts().values())).detach()) < 1e-6
    found = invert_gradient(given, y, iterations=2)
    assert found.inputs.shape == x.shape


def test_rows_show_one_by_one_where_neurons_are_moved_by_one_row_alone():
    """Pixels (1, 0) move neurons 0 and 1, (0, 0.5) neurons 2 and 3; neuron 4 is moved by both and shows neither."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, -1.0], [-1.0, 1.0], [-1.0, 2.0], [1.0, 1.0]]))
        model[1].bias.zero_()
    x, y = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.5]]]]), torch.tensor([2, 0])
    fed = fed_rows(seen(model, x, y), 2)
    order = fed.features[:, 0].argsort(descending=True)
    assert torch.allclose(fed.features[order], torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64), atol=1e-6)
    assert fed.labels[order].tolist() == [2, 0]


def test_exclusive_neurons_keep_images_of_one_class_apart():
    """Features and labels of all four rows are read, and each image is found from its own; a delta gives the same."""
    model, y, ramp = net("cnn", (1, 16, 16), 3), torch.tensor([1, 1, 1, 2]), torch.linspace(0.1, 0.9, 16)
    x = torch.stack(
        [ramp.expand(16, 16), ramp.flip(0).expand(16, 16), ramp[:, None].expand(16, 16), 0 * ramp.expand(16, 16)]
    )
    given = seen(model, x[:, None], y)
    made = exclusive_neurons(given, iterations=60)
    assert made.notes["rows_read"] == 4
    assert sorted(made.labels.tolist()) == y.tolist()
    assert min(matched(made.inputs, x[:, None]).psnr) > 25
    delta = as_gradient(seen(model, x[:, None], y, replace(SGD, batch_size=4, steps=1)))[0]
    both = [fed_rows(one, 4).features.norm(dim=1).sort().values for one in (given, delta)]
    assert torch.allclose(*both, rtol=1e-3)


def test_a_row_that_no_neuron_shows_stays_grey():
    """Two equal rows move the same neurons alike; what is read of them are not two."""
    model, x = net("cnn"), batch(2)[0]
    x[1] = 1 - x[0]
    model[7].weight.data[2:] = 0
    model[7].bias.data[2:] = -1  # two neurons are left, which both rows may move
    model[7].weight.data[:2].abs_()
    refuse("shows one row of a batch of 2 alone", exclusive_neurons, seen(model, x, torch.tensor([0, 1])))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_no_models_gradient_of_one_row_shows_none(seed):
    """Random numbers, of which a neuron fits some label by chance, and the gradient with noise."""
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)), *batch(1)
    given, rng = seen(model, x, y), torch.Generator().manual_seed(seed)
    noise = torch.randn(given.sent.shape, generator=rng)
    for sent in (noise, given.sent + 1e-2 * given.sent.abs().max() * noise):
        refuse("shows one row of a batch of 1 alone", exclusive_neurons, replace(given, sent=sent))
    assert exclusive_neurons(given, iterations=1).labels.tolist() == y.tolist()


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"iterations": 1.5}, {"restarts": 0}, {"smoothness": -1.0}])
def test_exclusive_neurons_refuses_settings_that_search_nothing(wrong):
    with pytest.raises(AttackError, match=f"exclusive_neurons: .*{next(iter(wrong))}="):
        exclusive_neurons(seen(net("logistic"), *batch(1)), **wrong)


def test_a_delta_of_one_sgd_step_is_the_gradient():
    model, (x, y) = net(), batch(2)
    there, whole = as_gradient(seen(model, x, y, replace(SGD, batch_size=2, steps=1)))
    assert whole
    assert torch.allclose(there.sent, seen(model, x, y).sent, atol=1e-5)


def test_labels_of_a_batch_are_counted_and_sum_to_its_size():
    torch.manual_seed(0)
    model = MENU["lenet"].make((1, 8, 8), 10)
    y = torch.tensor([0, 0, 0, 3, 7, 7, 9, 9])
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    counts = fedllm_sec.reveal_labels(gradient(model, x, y), model, 8)
    assert counts.tolist() == [3, 0, 0, 1, 0, 0, 0, 2, 0, 2]
    single = fedllm_sec.reveal_labels(gradient(model, x[3:4], y[3:4]), model, 1, shape=(1, 8, 8))
    assert single.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("optimizer", "least"), [("sgd", 1.0), ("adamw", 0.5)])
def test_labels_are_counted_in_a_delta_with_rows_of_ones_own(optimizer: str, least: float):
    torch.manual_seed(0)
    model = MENU["lenet"].make((1, 8, 8), 4)
    rng = torch.Generator().manual_seed(5)
    y = torch.randint(4, (80,), generator=rng)
    x = (0.25 * y[:, None, None, None] + 0.2 * torch.rand(80, 1, 8, 8, generator=rng)).clamp(0, 1)
    own = Labelled(x[40:], y[40:], 4, torch.zeros(40, dtype=torch.bool))
    kind = replace(SGD, batch_size=8, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3)
    given = seen(model, x[:16], y[:16], kind)
    if optimizer == "adamw":
        given = replace(given, sent=adam(model, x[:16], y[:16], given))
    counts = reveal(replace(given, auxiliary=own), 16)
    true = y[:16].bincount(minlength=4)
    assert int(counts.sum()) == 16
    assert float(torch.minimum(counts, true).sum()) / 16 >= least


def test_rounding_moves_single_labels_to_the_least_residual():
    right = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    found = rounded(torch.tensor([2.4, 0.2, 1.4], dtype=torch.float64), 4, torch.eye(3, dtype=torch.float64), right)
    assert found.tolist() == [2, 1, 1]


def refuse(words: str, call, *args, **settings):
    with pytest.raises(AttackError, match=words):
        call(*args, **settings)


def test_what_cannot_be_attacked_says_why():
    model, (x, y) = net(), batch(4)
    one, delta = seen(model, x[:1], y[:1]), seen(model, x, y, SGD)
    make = {name: entry.make for name, entry in PRIVACY_MENU.items()}
    refuse("no trained linear layer with a bias is fed the input", make["linear_layer"], one)
    refuse("a mixture of the inputs", make["linear_layer"], seen(net("logistic"), x, y))
    refuse("size of the batch is not known", make["dlg"], replace(one, rows=None))
    refuse("sign of the gradient names one label", make["idlg"], seen(model, x, y))
    refuse("is no gradient", make["dlg"], delta)
    refuse("clipped", make["dlg"], replace(one, training=replace(SGD, max_grad_norm=1e-3)))
    refuse("not finite", make["dlg"], replace(one, sent=one.sent * torch.nan))
    refuse("statistics of other rows", make["reveal_labels"], delta)
    adam = replace(SGD, optimizer="adamw")
    refuse("adamw steps are not unrolled", make["invert_gradient"], replace(delta, training=adam))
    refuse("too many to unroll", make["invert_gradient"], replace(delta, steps=17))
    refuse("more than once through", make["invert_gradient"], replace(delta, size=3), y[:4])
    cut = replace(SGD, max_grad_norm=1e-3)
    refuse("labels are told by it", make["exclusive_neurons"], replace(one, training=cut))
    refuse(
        "no trained linear layer",
        make["exclusive_neurons"],
        seen(nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), x, y),
    )
    refuse("delta is zero", make["dlg"], replace(delta, steps=1, sent=torch.zeros_like(delta.sent)))
    normed = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))
    refuse("statistics that were not observed", make["idlg"], seen(normed, x[:1], y[:1]))


def test_one_liners_refuse_what_does_not_fit_in_words():
    model, (x, y) = net(), batch(1)
    given, shape = gradient(model, x, y), (1, 1, 8, 8)
    refuse('Did you mean "dlg"', fedllm_sec.reconstruct, given, model, shape, "dlgg")
    refuse("has no setting", fedllm_sec.reconstruct, given, model, shape, "dlg", iteration=3)
    refuse("needs \\(n, \\*input\\)", fedllm_sec.reconstruct, given, model, (8,))
    refuse("gradient lacks", fedllm_sec.reconstruct, {}, model, shape)
    refuse("gradient has shape", fedllm_sec.reconstruct, np.zeros(3, dtype=np.float32), model, shape)
    refuse("for 1 rows", fedllm_sec.reconstruct, given, model, shape, labels=[1, 2])
    refuse("finds the label itself", fedllm_sec.reconstruct, given, model, shape, "idlg", labels=[1])
    refuse("whole number of rows, at least 1", fedllm_sec.reveal_labels, given, model, 0)


def test_every_name_has_a_paper_and_a_kind():
    assert {entry.kind for entry in PRIVACY_MENU.values()} == {"images", "labels", "membership", "canary", "tokens"}
    assert all(entry.paper for entry in PRIVACY_MENU.values())
