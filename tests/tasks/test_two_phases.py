"""GAN and architecture search: the one gradient of a step is the two phases' gradients, each in its own part."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.models.darts import OPERATIONS, darts, genotype
from fedllm_sec.models.gan import dcgan, mlp_gan
from fedllm_sec.protocols import Labelled
from fedllm_sec.tasks.gan import Gan
from fedllm_sec.tasks.nas import Nas

CPU = torch.device("cpu")


def images(n=8, side=8) -> Labelled:
    x = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(0))
    return Labelled(x, torch.arange(n) % 3, 3, torch.zeros(n, dtype=torch.bool))


def test_each_phase_of_a_gan_has_its_own_gradient():
    task, shard = Gan(mlp_gan((1, 8, 8), 3, noise=4, hidden=8), CPU), images()
    torch.manual_seed(3)
    task.loss(shard, torch.arange(8)).backward()
    found = task.layout.split(task.parameters.grad.clone())

    torch.manual_seed(3)
    noise, pair = torch.randn(8, 4), task.model
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    fake = pair.generator(noise)
    phase = binary(pair.discriminator(2 * shard.x - 1), torch.ones(8, 1))
    phase = phase + binary(pair.discriminator(fake.detach()), torch.zeros(8, 1))
    judged = binary(pair.discriminator(fake), torch.ones(8, 1))
    parts = {"discriminator": phase, "generator": judged}
    for name, loss in parts.items():
        part = getattr(pair, name)
        expected = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
        for (key, _), gradient in zip(part.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[f"{name}.{key}"], gradient)


def test_samples_are_images_from_0_to_1():
    for make in (mlp_gan, dcgan):
        made = Gan(make((1, 28, 28), 10), CPU).samples(torch.randn(3, 64))
        assert made.shape == (3, 1, 28, 28)
        assert 0 <= made.min() < made.max() <= 1


def test_weights_learn_on_even_rows_and_the_architecture_on_odd_ones():
    task, shard = Nas(darts((1, 8, 8), 3, width=4), CPU), images()
    rows = torch.tensor([0, 1, 2, 5, 6])
    task.loss(shard, rows).backward()
    found = task.layout.split(task.parameters.grad.clone())
    for mine, at in ((False, [0, 2, 6]), (True, [1, 5])):
        loss = torch.nn.functional.cross_entropy(task.model(shard.x[at]), shard.y[at])
        named = [(n, p) for n, p in task.model.named_parameters() if n.startswith("arch_") is mine]
        expected = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        for (name, _), gradient in zip(named, expected, strict=True):
            torch.testing.assert_close(found[name], gradient if gradient is not None else torch.zeros_like(found[name]))


def test_an_epoch_of_the_search_takes_every_row_once_half_of_each_kind():
    task, shard = Nas(darts((1, 8, 8), 3, width=4), CPU), images(13)
    batches = list(task.batches(shard, 4, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(13))
    assert all(abs(int((b % 2 == 0).sum()) - int((b % 2).sum())) <= 1 for b in batches)
    assert len(batches) == 4
    single = list(task.batches(images(1), 4, torch.Generator()))
    assert [b.tolist() for b in single] == [[0]]
    task.loss(images(1), single[0]).backward()


@pytest.mark.parametrize(("n", "size"), [(4, 1), (9, 3), (13, 4), (7, 2), (12, 12), (3, 50)])
def test_no_batch_of_the_search_is_empty_or_larger_than_asked_for(n, size):
    task = Nas(darts((1, 8, 8), 3, width=4), CPU)
    batches = list(task.batches(images(n), size, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert len(batches) == -(-n // size)
    assert all(1 <= len(b) <= size for b in batches)
    assert all(len(set((b % 2).tolist())) == 2 for b in batches if len(b) > 1)


def test_a_genotype_takes_the_two_strongest_edges_of_each_node_and_never_none():
    arch = torch.zeros(5, len(OPERATIONS))
    arch[:, 0] = 9.0  # "none" is strongest everywhere and must not be chosen
    arch[0, 1], arch[1, 3] = 1.0, 2.0  # first node: both inputs
    arch[2, 2], arch[3, 4], arch[4, 1] = 3.0, 1.0, 2.0  # second node: input 0 and node 2
    assert genotype(arch, 2) == [[("skip", 0), ("conv_3", 1)], [("avg_pool", 0), ("skip", 2)]]


def test_the_architecture_weights_the_operations():
    """With all weight on none, no edge passes anything on: the logits are the last layer's bias."""
    model = darts((1, 8, 8), 3, width=4)
    with torch.no_grad():
        for arch in (model.arch_normal, model.arch_reduce):
            arch.fill_(-100)
            arch[:, 0] = 100
    logits = model(torch.rand(2, 1, 8, 8))
    torch.testing.assert_close(logits, model.fc.bias.expand(2, 3))
