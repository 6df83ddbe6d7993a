"""The batch axis of each input, and slicing of feeds along it.

    x (n, 64)                                   axis 0
    x (time, batch, 64), state (2, batch, 128)  axis 1 of both
    x (n, 64), k (), mean (3)                   axis 0 of x; k and mean have none: one value for a whole run

The batch is the dynamic dimension with a usual batch name, or the one that most inputs share; without a name it is the
first one. If all first dimensions are fixed, it is the size that most inputs begin with.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.types import Array, Feeds, Shape

Dim = int | str | None
"""A fixed size, the name of a dynamic dimension, or None for a dynamic dimension without a name."""

_BATCH_NAME = re.compile(r"n|b|bs|.*batch.*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class BatchAxes:
    """The batch axes of a model's inputs.

    Attributes:
        axes: input name -> batch axis, or None.
        fixed: batch size if the model fixes it, else None.
    """

    axes: Mapping[str, int | None]
    fixed: int | None

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[Dim]]) -> "BatchAxes":
        """Find the batch axes.

        Args:
            shapes: input name -> dimensions; a symbol or None is dynamic.

        Example:
            >>> dict(BatchAxes.of({"x": ("t", "batch", 8), "state": (2, "batch", 16), "k": ()}).axes)
            {'x': 1, 'state': 1, 'k': None}
        """
        symbol = _batch_symbol(list(shapes.values()))
        if symbol is not None or any(shape and not isinstance(shape[0], int) for shape in shapes.values()):
            return cls(axes={name: _dynamic_axis(shape, symbol) for name, shape in shapes.items()}, fixed=None)
        fixed = _fixed_batch(list(shapes.values()))
        return cls(axes={name: _axis_of(shape, fixed) for name, shape in shapes.items()}, fixed=fixed)

    def samples(self, feeds: Feeds) -> int:
        """Return the number of samples in the feeds; 1 if no input has a batch axis."""
        sizes = (
            array.shape[axis]
            for name, array in feeds.items()
            if (axis := self.axes.get(name)) is not None and axis < array.ndim
        )
        return next(sizes, 1)

    def cut(self, feeds: Feeds, rows: slice | npt.NDArray[np.int64]) -> dict[str, Array]:
        """Select samples of the feeds; inputs without a batch axis stay whole."""
        found = {}
        for name, array in feeds.items():
            axis = self.axes.get(name)
            at: tuple[Any, ...] = () if axis is None else (*[slice(None)] * axis, rows)
            found[name] = np.ascontiguousarray(array[at]) if at else array
        return found

    def joined(self, parts: Sequence[Feeds]) -> dict[str, Array]:
        """Concatenate feeds along the batch; inputs without a batch axis come from the first part."""
        return {
            name: array if (axis := self.axes.get(name)) is None else np.concatenate([p[name] for p in parts], axis)
            for name, array in parts[0].items()
        }

    def sample_shapes(self, feeds: Feeds) -> dict[str, Shape]:
        """Return the shapes of the feeds with a batch of one sample."""
        found = {}
        for name, array in feeds.items():
            axis = self.axes.get(name)
            found[name] = tuple(1 if at == axis else size for at, size in enumerate(array.shape))
        return found

    def with_batch(self, shapes: Mapping[str, Sequence[int]], batch: int) -> dict[str, Shape]:
        """Replace the batch size in shapes."""
        return {
            name: tuple(batch if at == self.axes.get(name) else size for at, size in enumerate(shape))
            for name, shape in shapes.items()
        }


def is_batch_name(symbol: str) -> bool:
    """Return whether a dimension has a usual batch name.

    Example:
        >>> [is_batch_name(symbol) for symbol in ("batch_size", "N", "seq")]
        [True, True, False]
    """
    return _BATCH_NAME.fullmatch(symbol) is not None


def _batch_symbol(shapes: Sequence[Sequence[Dim]]) -> str | None:
    """Return the name of the batch among the dynamic dimensions, or None."""
    uses = Counter(dim for shape in shapes for dim in dict.fromkeys(shape) if isinstance(dim, str))
    firsts = [shape[0] for shape in shapes if shape and isinstance(shape[0], str)]
    # (1, n) is one sample of n numbers, not n samples.
    ones = {symbol for shape in shapes for symbol in shape if shape[0] == 1 and not firsts}
    candidates = [s for s in uses if is_batch_name(s) and (s not in ones or "batch" in s.lower())]
    if candidates:
        return max(candidates, key=lambda symbol: (symbol in firsts, uses[symbol]))
    best = max(firsts, key=lambda symbol: uses[symbol], default=None)
    # A state (layers, m, width) beside x (time, m, width): the dimension that all of them share is the batch.
    behind = [shape for shape in shapes if len(shape) > 1 and isinstance(shape[0], int) and best not in shape]
    shared = [s for s in uses if uses[s] == len([shape for shape in shapes if len(shape) > 1])]
    moved = [s for s in shared if behind and all(s in shape for shape in behind)]
    return moved[0] if moved and (best is None or uses[best] < uses[moved[0]]) and firsts else best


def _dynamic_axis(shape: Sequence[Dim], symbol: str | None) -> int | None:
    if symbol is not None and symbol in shape:
        return list(shape).index(symbol)
    return 0 if shape and not isinstance(shape[0], int) else None


def _fixed_batch(shapes: Sequence[Sequence[Dim]]) -> int | None:
    """Return the first size that most inputs have among their first two; on a tie, that of the first matrix."""
    firsts = [shape[0] for shape in shapes if shape and isinstance(shape[0], int)]
    if not firsts:
        return None
    matrices = [shape for shape in shapes if len(shape) > 1]
    uses = Counter(dim for shape in matrices for dim in set(shape[:2]))
    first = matrices[0][0] if matrices else firsts[0]
    return max(firsts, key=lambda size: (uses[size], size == first))


def _axis_of(shape: Sequence[Dim], fixed: int | None) -> int | None:
    """Return the batch axis of an input of a model with a fixed batch."""
    if fixed is None or not shape:
        return None
    if shape[0] == fixed:
        return 0
    return list(shape).index(fixed) if len(shape) > 2 and shape[1] == fixed else None


def has_shape(shape: Sequence[int], dims: Sequence[Dim]) -> bool:
    """Return whether a shape has as many axes as `dims`, with the same fixed sizes."""
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
    )


def open_axis(dims: Sequence[Dim], axis: int) -> tuple[Dim, ...]:
    """Make one dimension dynamic."""
    return (*dims[:axis], None, *dims[axis + 1 :])
