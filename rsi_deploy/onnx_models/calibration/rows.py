"""Gather rows of a site's input inside onnxruntime: a random part of the positions, which the caller chooses.

    product   data (..., in) --Reshape--> (positions, in) --Gather--> rows (rows, in)
    Conv      data (N, C, *size) --Transpose--> (N, *size, C) --Gather, Mul--> patches (N * positions, points * C)

Only rows that are used leave the provider, and no whole patch matrix exists. The channels of a patch lie side by side
in memory, so the columns are sorted by the kernel's points, then by channels.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, helper

import graph_passes as gp

Array = npt.NDArray[Any]


class Taps:
    """Nodes and constants that gather rows, to be added to a graph.

    Attributes:
        nodes: nodes, to follow those of the graph.
        constants: shapes that the nodes use.
        inputs: name -> ONNX type of their index inputs.
        outputs: names of the rows.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: dict[str, int] = {}
        self.outputs: list[str] = []

    def rows(self, value: str, tag: str, width: int, order: Sequence[int] = ()) -> str:
        """Add nodes that gather rows of `value`, and return the name of the rows.

        The input `{tag}/index (rows,)` counts the rows of the flattened value `(-1, width)`.

        Args:
            value: name of the value.
            tag: prefix of the names of nodes, inputs and outputs.
            width: numbers in a row, over one or several last axes.
            order: order of the axes in which the rows come first; () leaves them as they are.
        """
        if order:
            value = self._node("Transpose", [value], f"{tag}/ordered", perm=list(order))
        flat = self._reshape(value, f"{tag}/flat", (-1, width))
        return self._cast(self._gather(flat, tag, 0), f"{tag}/rows")

    def positions(self, value: str, tag: str, width: int) -> str:
        """Gather rows `(N * positions, width)` of `value (N, width, *size)` by the input `{tag}/index (positions,)`."""
        flat = self._gather(self._reshape(value, f"{tag}/flat", (0, width, -1)), tag, 2)
        turned = self._node("Transpose", [flat], f"{tag}/turned", perm=[0, 2, 1])
        return self._cast(self._reshape(turned, f"{tag}/2d", (-1, width)), f"{tag}/rows")

    def patches(self, value: str, tag: str, channels: int, points: int) -> str:
        """Gather patches `(N * positions, points * channels)` of `value (N, channels, *size)`.

        Inputs: `{tag}/index (positions * points,)`, and `{tag}/inside (positions * points, 1)`, float32, 0 for padding.
        """
        flat = self._reshape(value, f"{tag}/flat", (0, channels, -1))
        last = self._node("Transpose", [flat], f"{tag}/last", perm=[0, 2, 1])
        cast = self._node("Cast", [self._gather(last, tag, 1)], f"{tag}/float", to=TensorProto.FLOAT)
        self.inputs[f"{tag}/inside"] = TensorProto.FLOAT
        inside = self._node("Mul", [cast, f"{tag}/inside"], f"{tag}/masked")
        rows = self._reshape(inside, f"{tag}/rows", (-1, points * channels))
        self.outputs.append(rows)
        return rows

    def constant(self, value: str, tag: str) -> str:
        """Add a value as an output, float32."""
        return self._cast(value, tag)

    def shape(self, value: str, tag: str) -> str:
        """Add the shape of a value as an output, int64."""
        name = self._node("Shape", [value], f"{tag}/shape")
        self.outputs.append(name)
        return name

    def _gather(self, value: str, tag: str, axis: int) -> str:
        self.inputs[f"{tag}/index"] = TensorProto.INT64
        return self._node("Gather", [value, f"{tag}/index"], f"{tag}/gathered", axis=axis)

    def _reshape(self, value: str, name: str, shape: Sequence[int]) -> str:
        self.constants.append(helper.make_tensor(f"{name}/shape", TensorProto.INT64, [len(shape)], shape))
        return self._node("Reshape", [value, f"{name}/shape"], name)

    def _cast(self, value: str, name: str) -> str:
        self.outputs.append(self._node("Cast", [value], name, to=TensorProto.FLOAT))
        return name

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output


def chosen(count: int, limit: int, generator: np.random.Generator, allowed: Array | None = None) -> Array:
    """Choose `limit` of the numbers below `count` (or of `allowed`), ascending int64; all where there are fewer."""
    pool = np.arange(count) if allowed is None else allowed
    if limit >= len(pool):
        return pool.astype(np.int64)
    return np.sort(generator.choice(pool, limit, replace=False)).astype(np.int64)


def output_size(window: gp.Window, size: Sequence[int]) -> tuple[int, ...]:
    """Return the spatial size of a Conv's output over data of spatial size `size`."""
    pads, axes = window.pads_over(size), len(size)
    return tuple(
        (size[a] + pads[a] + pads[axes + a] - (window.kernel[a] - 1) * window.dilations[a] - 1) // window.strides[a] + 1
        for a in range(axes)
    )


@functools.lru_cache(maxsize=8)
def all_patches(window: gp.Window, size: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return all positions, int64, with `patch_index` of them; cached, because batches of one size share them."""
    positions = np.arange(math.prod(output_size(window, size)), dtype=np.int64)
    return (positions, *patch_index(window, size, positions))


def patch_index(window: gp.Window, size: Sequence[int], positions: Array) -> tuple[Array, Array]:
    """Return where the patches at these output positions lie in the flattened data.

    Args:
        window: window of the Conv.
        size: spatial size of the data.
        positions: int64 `(positions,)` in the flattened output.

    Returns:
        index int64 `(positions * prod(kernel),)` and inside float32 `(positions * prod(kernel), 1)`.
    """
    pads = window.pads_over(size)
    where = np.unravel_index(positions, output_size(window, size))
    points = np.array(list(itertools.product(*(range(k) for k in window.kernel)))).reshape(-1, len(size))
    flat = np.zeros((len(positions), len(points)), np.int64)
    inside = np.ones(flat.shape, bool)
    for axis, length in enumerate(size):
        start = where[axis] * window.strides[axis] - pads[axis]
        at = start[:, None] + points[None, :, axis] * window.dilations[axis]
        inside &= (at >= 0) & (at < length)
        flat = flat * length + at.clip(0, length - 1)
    return flat.reshape(-1), inside.reshape(-1, 1).astype(np.float32)
