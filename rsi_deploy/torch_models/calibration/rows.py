"""Rows of the inputs and outputs of a torch layer: a random choice, used at the same positions in both networks.

    Linear, Conv1D   x (..., in)          -> (1, rows, in)                        rows of the flattened leading axes
    Conv             x (N, in, *size)     -> (groups, rows, in/groups * points)   patches of the padded data

The rows of a Conv are the same output positions of every sample, position by position. Its columns are those of
`graph_passes.unfold(weight, "channel")`. Patches are made in pieces, to bound the memory.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIECE_BYTES = 64 * 2**20
"""Bytes of one piece of rows."""


class Choice(NamedTuple):
    """The chosen rows of one call: int64 positions `at (positions,)`, and for a Conv the `samples (N',)`."""

    at: Tensor
    samples: Tensor


class Reader(Protocol):
    """A reader of the rows of one layer."""

    def count(self, x: Tensor) -> int:
        """Return the number of rows of an input."""

    def choose(self, x: Tensor, quota: int, generator: torch.Generator, kept: Tensor | None) -> Choice:
        """Choose at most `quota` rows, without padding if the mask `kept (N, L)`, bool, fits the data."""

    def held(self, x: Tensor, choice: Choice) -> Tensor:
        """Return the part of `x` that is needed to read the rows; it may be `x` itself."""

    def pieces(self, held: Tensor, choice: Choice) -> Iterator[Tensor]:
        """Yield the chosen rows in pieces, float32 `(groups, some, in)`."""

    def outputs(self, value: Tensor, choice: Choice) -> Tensor:
        """Return the same rows of a tensor with the shape of the output, float32 `(groups, rows, out)`."""


class LinearReader:
    """A reader for a layer that multiplies the last axis, of width `in_features`."""

    def __init__(self, in_features: int) -> None:
        self._rows = max(1, PIECE_BYTES // (4 * in_features))

    def count(self, x: Tensor) -> int:
        """See `Reader`."""
        return math.prod(x.shape[:-1])

    def choose(self, x: Tensor, quota: int, generator: torch.Generator, kept: Tensor | None) -> Choice:
        """See `Reader`."""
        no_samples = torch.empty(0, dtype=torch.int64)
        if kept is None or x.ndim < 3 or x.shape[:2] != kept.shape:
            return Choice(_chosen(self.count(x), quota, generator).to(x.device), no_samples)
        width = math.prod(x.shape[2:-1])
        pool = kept.reshape(-1, 1).expand(-1, width).reshape(-1).nonzero().squeeze(-1).to(x.device)
        return Choice(pool[_chosen(len(pool), quota, generator).to(x.device)], no_samples)

    def held(self, x: Tensor, choice: Choice) -> Tensor:
        """See `Reader`."""
        return x.reshape(-1, x.shape[-1])[choice.at]

    def pieces(self, held: Tensor, choice: Choice) -> Iterator[Tensor]:
        """See `Reader`."""
        for piece in torch.split(held, self._rows):
            yield piece.float()[None]

    def outputs(self, value: Tensor, choice: Choice) -> Tensor:
        """See `Reader`."""
        return self.held(value, choice).float()[None]


class ConvReader:
    """A reader for a convolution with any number of axes, groups and padding."""

    def __init__(self, conv: "nn.modules.conv._ConvNd") -> None:
        self._groups, self._channels, self._kernel = conv.groups, conv.in_channels, conv.kernel_size
        self._stride, self._dilation = conv.stride, conv.dilation
        self._edges = conv._reversed_padding_repeated_twice
        self._mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    def count(self, x: Tensor) -> int:
        """See `Reader`."""
        samples = 1 if x.ndim == len(self._kernel) + 1 else x.shape[0]
        return samples * math.prod(self._output_size(x))

    def choose(self, x: Tensor, quota: int, generator: torch.Generator, kept: Tensor | None) -> Choice:
        """See `Reader`; a Conv has no use for `kept`."""
        count = self._batched(x).shape[0]
        samples = _chosen(count, quota, generator)
        at = _chosen(math.prod(self._output_size(x)), max(1, quota // max(count, 1)), generator)
        return Choice(at.to(x.device), samples.to(x.device))

    def held(self, x: Tensor, choice: Choice) -> Tensor:
        """See `Reader`; these are the padded data."""
        return F.pad(self._batched(x), self._edges, mode=self._mode) if any(self._edges) else self._batched(x)

    def pieces(self, held: Tensor, choice: Choice) -> Iterator[Tensor]:
        """See `Reader`."""
        x = held if len(choice.samples) == len(held) else held[choice.samples]
        if not len(x):
            return
        size, points = x.shape[2:], math.prod(self._kernel)
        starts, steps = self._index(size, choice.at)
        flat = x.reshape(len(x), self._groups, -1, math.prod(size))
        for some in torch.split(starts, max(1, PIECE_BYTES // (4 * len(x) * self._channels * points))):
            patches = flat[..., (some[:, None] + steps).reshape(-1)].float()
            patches = patches.reshape(*flat.shape[:3], len(some), points).permute(1, 3, 0, 2, 4)
            yield patches.reshape(self._groups, len(some) * len(x), -1)

    def outputs(self, value: Tensor, choice: Choice) -> Tensor:
        """See `Reader`."""
        rows = self._batched(value).flatten(2)[choice.samples][..., choice.at].float()
        samples, channels, positions = rows.shape
        rows = rows.reshape(samples, self._groups, channels // self._groups, positions).permute(1, 3, 0, 2)
        return rows.reshape(self._groups, positions * samples, -1)

    def _batched(self, x: Tensor) -> Tensor:
        return x[None] if x.ndim == len(self._kernel) + 1 else x

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        """Return the spatial size of the output for unpadded data."""
        axes = len(self._kernel)
        pads = [sum(self._edges[2 * axis : 2 * axis + 2]) for axis in reversed(range(axes))]
        return self._size([n + pad for n, pad in zip(x.shape[-axes:], pads, strict=True)])

    def _size(self, padded: Sequence[int]) -> tuple[int, ...]:
        geometry = zip(padded, self._kernel, self._stride, self._dilation, strict=True)
        return tuple((n - (k - 1) * dilation - 1) // stride + 1 for n, k, stride, dilation in geometry)

    def _index(self, padded: Sequence[int], at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the starts of the patches at positions `at` in the flattened padded data, and the point offsets."""
        pitch = [math.prod(padded[axis + 1 :]) for axis in range(len(padded))]
        where = torch.unravel_index(at, self._size(padded))
        starts = torch.stack([o * s * p for o, s, p in zip(where, self._stride, pitch, strict=True)]).sum(dim=0)
        reach = [
            [k * d * p for k in range(size)] for size, d, p in zip(self._kernel, self._dilation, pitch, strict=True)
        ]
        return starts, torch.tensor([sum(point) for point in itertools.product(*reach)], device=at.device)


def find_mask(arguments: Sequence[object]) -> int | None:
    """Return the index of the padding mask of data padded at the end, or None.

    The mask is the first argument of integers or booleans `(N, L)` with values 0 and 1 whose rows all begin with 1.
    Segment numbers begin with 0, and token numbers have other values.
    """
    for index, mask in enumerate(arguments):
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.numel() and not mask.is_floating_point():
            ones = mask == 1
            if bool(ones[:, 0].all()) and bool((ones | (mask == 0)).all()):
                return index
    return None


def _chosen(count: int, quota: int, generator: torch.Generator) -> Tensor:
    """Return `quota` random indices below `count` in ascending order, or all if there are no more."""
    if quota >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:quota].sort().values
