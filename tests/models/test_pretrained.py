"""Image classifiers of transformers, from folders, as small models; tiny random ones here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from fedllm_sec.build.names import checked
from fedllm_sec.errors import RecipeError
from fedllm_sec.models.pretrained import ImageLora, brought, image_classifier, wanted

SHAPE = (3, 16, 16)
GREY = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained(folder)
    processor(folder, size={"shortest_edge": 24}, do_center_crop=True, crop_size={"height": 16, "width": 16})
    return folder


def processor(folder: Path, **given: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps({**GREY, **given}))


def test_the_output_layer_is_new_and_the_rest_is_the_folders(resnet: Path):
    model = image_classifier(SHAPE, 3, folder=str(resnet))
    assert model(torch.rand(2, *SHAPE)).logits.shape == (2, 3)
    kept = ResNetForImageClassification.from_pretrained(resnet).state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("classifier") or torch.equal(value, kept[name])
    drawn = image_classifier(SHAPE, 3, folder=str(resnet), pretrained=False)
    first = "resnet.embedder.embedder.convolution.weight"
    assert not torch.equal(drawn.state_dict()[first], kept[first])


def test_parameters_are_counted_without_reading_a_weight(resnet: Path):
    with torch.device("meta"):
        counted = image_classifier(SHAPE, 3, folder=str(resnet))
    made = image_classifier(SHAPE, 3, folder=str(resnet))
    assert {name: p.shape for name, p in counted.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_an_adapter_leaves_the_rest_frozen(tmp_path: Path):
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
                       patch_size=8)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    model = image_classifier(SHAPE, 3, folder=str(tmp_path), lora=ImageLora(r=2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)
    with pytest.raises(RecipeError, match=r"model\.lora\.target_modules: \['nope'\].* called fc1, fc2, k_proj"):
        image_classifier(SHAPE, 3, folder=str(tmp_path), lora=ImageLora(target_modules=["nope"]))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": 16}, (16, 16)),
        ({"size": {"height": 24, "width": 32}}, (24, 32)),
        ({"size": 24}, (24, 24)),
        ({"size": {"shortest_edge": 24}}, (24, 24)),
        ({"size": 24, "do_resize": False}, None),
        ({}, None),
    ],
)
def test_images_are_brought_to_what_the_processor_ends_with(tmp_path: Path, settings, size):
    (tmp_path / "config.json").write_text(json.dumps({"num_channels": 3}))
    processor(tmp_path, **settings)
    found = wanted(str(tmp_path), None, None)
    assert (found.size, found.channels) == (size, 3)
    assert found.mean is not None
    assert found.mean.tolist() == [0.5, 0.5, 0.5]
    assert wanted(str(tmp_path), None, 8).size == (8, 8)
    x = torch.rand(2, 1, 6, 6)
    made = brought(x, wanted(str(tmp_path), None, 3))
    assert made.shape == (2, 3, 3, 3)
    assert torch.equal(made[:, 0], made[:, 2])
    torch.testing.assert_close(made.mean(), x.mean(), atol=0.05, rtol=0)
    assert torch.equal(brought(x.expand(-1, 3, -1, -1), wanted(str(tmp_path), None, 6)), x.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_input_names": ["flattened_patches"]}, "makes other than pixels"),
        ({"image_std": [0.5, 0.5]}, "must be 3 numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "3 above 0"),
        ({"size": {"longest_edge": 4}}, "is no height and width"),
        ({"size": 2.5}, r"size 2\.5 is no height and width"),
    ],
)
def test_a_processor_that_cannot_be_followed_is_refused(tmp_path: Path, settings, words):
    (tmp_path / "config.json").write_text("{}")
    processor(tmp_path, **settings)
    with pytest.raises(RecipeError, match=words):
        wanted(str(tmp_path), None, None)


def test_folders_that_are_no_classifiers_are_refused_with_their_reason(tmp_path: Path, resnet: Path):
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(RecipeError, match=words):
            image_classifier(SHAPE, 3, folder=str(folder))

    refused(tmp_path / "none", "no such folder")
    refused(tmp_path, r"holds no config\.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, r"holds no \*\.safetensors")
    (tmp_path / "model.safetensors").write_bytes((resnet / "model.safetensors").read_bytes())
    refused(tmp_path, "has no image classifier in transformers")
    (tmp_path / "config.json").write_bytes((resnet / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(tmp_path, r"its model\.safetensors is cut off, or no safetensors file\. Download it again")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, "pointer of Git LFS, not the weights")
    with pytest.raises(RecipeError, match="takes images of 3 channels, the data have 4"):
        brought(torch.rand(1, 4, 2, 2), wanted(str(resnet), None, None))


def test_a_recipe_names_the_folder_and_check_sees_that_it_is_none(tmp_path: Path, resnet: Path):
    recipe = {"task": "classify", "clients": {"local_steps": 1}, "model": {"name": str(resnet), "size": 8}}
    assert checked(recipe).model["name"] == str(resnet)
    with pytest.raises(RecipeError, match="no such folder"):
        checked({**recipe, "model": {"name": str(tmp_path / "none")}})
    with pytest.raises(RecipeError, match=r"model\.sizes: 8 is set, but there is no such setting"):
        checked({**recipe, "model": {"name": str(resnet), "sizes": 8}})


def test_a_folder_that_lacks_weights_other_than_the_output_layers_is_refused(tmp_path: Path, resnet: Path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((resnet / "config.json").read_bytes())
    whole = load_file(resnet / "model.safetensors")
    save_file({k: v for k, v in whole.items() if "stages.1" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks \d+ weights of the model .* such as resnet\.encoder\.stages\.1"):
        image_classifier(SHAPE, 3, folder=str(tmp_path))


def test_adapters_on_convolutions_are_refused_in_words(resnet: Path):
    with pytest.raises(RecipeError, match="no linear layer but its output layer"):
        image_classifier(SHAPE, 3, folder=str(resnet), lora=ImageLora())


def test_the_processors_own_arithmetic_comes_out(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    pixels = torch.tensor([0.0, 51.0, 255.0])
    for settings in ({}, {"rescale_factor": 1 / 127.5, "rescale_offset": True}, {"do_normalize": False},
                     {"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}):  # fmt: skip
        processor(tmp_path, **settings)
        to = wanted(str(tmp_path), None, None)
        factor, offset = settings.get("rescale_factor", 1 / 255), float(settings.get("rescale_offset", False))
        mean, std = (0.5, 0.25) if settings.get("do_normalize", True) else (0.0, 1.0)
        expected = (pixels * factor - offset - mean) / std
        found = pixels / 255 if to.mean is None else (pixels / 255 - to.mean[0]) / to.std[0]
        torch.testing.assert_close(found, expected)
    processor(tmp_path, do_flip_channel_order=True)
    with pytest.raises(RecipeError, match="do_flip_channel_order"):
        wanted(str(tmp_path), None, None)
    (tmp_path / "config.json").write_text('{"num_channels": null}')
    with pytest.raises(RecipeError, match="num_channels: None"):
        wanted(str(tmp_path), None, None)
