"""Small models: their size is what their papers say, and none carries running statistics."""

from __future__ import annotations

import pytest
import torch

from fedllm_sec.errors import RecipeError
from fedllm_sec.models import MENU
from fedllm_sec.models.resnet import resnet

IMAGE, COLOUR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "settings", "count"),
    [
        ("logistic", IMAGE, 10, {}, 7_850),
        ("lenet", IMAGE, 10, {}, 61_706),
        ("lenet", COLOUR, 10, {}, 62_006),
        ("cnn", IMAGE, 10, {}, 1_663_370),
        ("cnn", IMAGE, 62, {}, 1_690_046),
        ("sigmoid_cnn", IMAGE, 10, {}, 13_426),
        ("resnet", COLOUR, 10, {}, 269_722),
        ("resnet", COLOUR, 10, {"norm": "batch"}, 269_722),
        ("resnet", COLOUR, 10, {"depth": 56}, 853_018),
        ("resnet18", COLOUR, 10, {}, 11_173_962),
        ("lstm", (80,), 90, {}, 822_570),
        ("lstm", (80,), 65, {}, 815_945),
        ("mlp_gan", IMAGE, 10, {}, 1_083_921),
        ("dcgan", IMAGE, 10, {}, 576_738),
        ("darts", IMAGE, 10, {}, 130_644),
    ],
)
def test_a_model_has_the_parameters_its_docstring_says(name, shape, classes, settings, count):
    model = MENU[name].make(shape, classes, **settings)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count:,}" in (MENU[name].make.__doc__ or "") or name == "lenet" or settings.get("norm")


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize(
    "name", [n for n, e in MENU.items() if e.kind == "classify" and n not in ("resnet18", "image_classifier")]
)
def test_a_classifier_takes_images_of_any_size(name, shape):
    assert MENU[name].make(shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


def test_resnet18_gives_one_logit_a_class():
    assert MENU["resnet18"].make((3, 16, 16), 5)(torch.rand(1, 3, 16, 16)).shape == (1, 5)


def test_batch_norm_is_an_option():
    names = [name for name, _ in resnet(COLOUR, 10, depth=8, norm="batch").named_buffers()]
    assert names[:3] == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert len(names) == 21  # seven layers
    assert not list(resnet(COLOUR, 10, depth=8).buffers())


def test_a_depth_that_is_no_resnet_is_refused():
    with pytest.raises(RecipeError, match="depth: 18"):
        resnet(COLOUR, 10, depth=18)


def test_a_residual_block_without_weights_is_the_identity():
    """With the last norm's scale at zero, only the option A shortcut is left: every other pixel, new maps zero."""
    from fedllm_sec.models.resnet import Block

    block = Block(1, 2, stride=2, norm="group", groups=1, project=False)
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    out = block(x)
    assert out[0, 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert out[0, 1].tolist() == [[0.0, 0.0], [0.0, 0.0]]
