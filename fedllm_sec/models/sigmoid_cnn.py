"""The smooth convolutional network of the gradient leakage papers."""

from __future__ import annotations

from torch import nn


def sigmoid_cnn(shape: tuple[int, ...], classes: int, *, spread: float = 0.5) -> nn.Module:
    """Three 5x5 convolutions of 12 maps, strides 2, 2, 1, sigmoids, no pooling, one linear layer (Zhu et al. 2019).

    13,426 parameters for 28x28, one channel and 10 classes. Twice differentiable, which `dlg` needs, and weights and
    biases are drawn uniformly from -`spread` to `spread`, as in the paper's own code: with torch's narrower start the
    gradients of the first layers all but vanish. Made to be attacked; it trains slowly.
    """
    channels, height, width = shape
    features = 12 * ((height + 3) // 4) * ((width + 3) // 4)  # each stride of 2 halves a side, rounded up
    model = nn.Sequential(
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(features, classes),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -spread, spread)
    return model
