"""Two small digit classifiers whose cost lies where low rank helps: wide Linear layers and packed attention.

::

    cnn   (N, 1, 8, 8) -> features: conv 3x3, pool, conv 3x3 -> 512 -> classifier: 512 -> 576 -> 512 -> 10
    vit   (N, 1, 8, 8) -> patches: 16 of 4x4, 2 apart -> (N, 16, 96) + positions -> 3 blocks -> mean -> head: 10

A factory returns a module with random weights; the trained ones lie beside this file as safetensors. The module tells
what it eats by two attributes, ``input_shape`` and ``preprocessing`` (on images scaled to 0..1).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

SIDE, CLASSES = 8, 10
PREPROCESSING = {"mean": (0.305,), "std": (0.376,), "layout": "NCHW"}
"""Mean and deviation of the training pixels, in units of white = 1."""


class Named(nn.Sequential):
    """A sequence of layers, each with a name."""

    def __init__(self, **layers: nn.Module):
        super().__init__(OrderedDict(layers))


class Digits(Named):
    """A model that tells its inputs."""

    input_shape = (1, 1, SIDE, SIDE)
    preprocessing = PREPROCESSING


class Encoder(nn.Module):
    """One pre-norm transformer block, ``x + MHA(LN(x))`` then ``x + MLP(LN(x))``; (N, tokens, width) to the same."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        grow, shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(grow, nn.GELU(), shrink, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Images (N, 1, 8, 8) to tokens (N, 16, width): a learned projection of each 4x4 patch plus its position."""

    def __init__(self, width: int):
        super().__init__()
        self.project = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).flatten(2).transpose(1, 2) + self.position


class MeanToken(nn.Module):
    """(N, tokens, width) to (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def cnn() -> Digits:
    """A VGG in small: 2.4 MB of float32, 98 % of it in two wide Linear layers."""
    conv1, conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    first = {"conv1": conv1, "norm1": nn.BatchNorm2d(16), "relu1": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    second = {"conv2": conv2, "norm2": nn.BatchNorm2d(32), "relu2": nn.ReLU(), "flatten": nn.Flatten()}
    wide = {"fc1": nn.Linear(512, 576), "relu1": nn.ReLU(), "drop1": nn.Dropout(0.5)}
    wide |= {"fc2": nn.Linear(576, 512), "relu2": nn.ReLU(), "drop2": nn.Dropout(0.5)}
    wide |= {"head": nn.Linear(512, CLASSES)}
    return Digits(features=Named(**first, **second), classifier=Named(**wide))


def vit() -> Digits:
    """A small vision transformer: 1.4 MB of float32; query, key and value weights packed into one ``in_proj``."""
    blocks = nn.Sequential(*[Encoder(96, heads=6, dropout=0.1) for _ in range(3)])
    ending = {"norm": nn.LayerNorm(96), "mean": MeanToken(), "head": nn.Linear(96, CLASSES)}
    return Digits(patches=Patches(96), blocks=blocks, **ending)
