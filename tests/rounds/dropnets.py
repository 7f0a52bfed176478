"""Small models with dropout, one for each kind of task; a recipe names them `tests.rounds.dropnets:...`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from fedllm_sec.models.darts import darts
from fedllm_sec.models.gan import mlp_gan
from fedllm_sec.models.lora import source_of


def classify(shape: tuple[int, ...], classes: int) -> nn.Module:
    last = nn.LazyLinear(classes)
    model = nn.Sequential(nn.Conv2d(shape[0], 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), last)
    model.eval()(torch.zeros(1, *shape))  # the last layer learns its size
    return model


def gan(shape: tuple[int, ...], classes: int) -> nn.Module:
    pair = mlp_gan(shape, classes, noise=4, hidden=8)
    pair.discriminator = nn.Sequential(nn.Dropout(0.3), pair.discriminator)
    pair.generator = nn.Sequential(nn.Dropout(0.3), pair.generator)
    return pair


def nas(shape: tuple[int, ...], classes: int) -> nn.Module:
    model = darts(shape, classes, width=4)
    model.fc = nn.Sequential(nn.Dropout(0.3), model.fc)
    return model


def gpt2(folder: Path) -> str:
    """A random GPT-2 of one layer with its usual dropout, and the tokenizer of the tiny model, in a folder."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(source_of("tiny"))
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
