"""From a node's operand back to the stored weight.

    initializer | Constant --> Identity | Transpose | Reshape | Squeeze | Unsqueeze | one Cast --> ... --> operand
    root                       steps: transposes and reshapes, merged                              shape, dtype

The walk reads shapes only; `Weight.numpy` reads the data, as a view where the layout allows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from graph_passes.constants import layout_chain, stored_array, stored_tensor
from graph_passes.names import name_of
from graph_passes.records import Array

Step: TypeAlias = tuple[Literal["transpose", "reshape"], tuple[int, ...]]

FLOAT_DTYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, kw_only=True)
class NoWeight:
    """A constant operand that cannot be split, with the reason and the weight's name where known."""

    reason: str
    weight: str = ""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A constant seen through layout steps.

    Attributes:
        root: The initializer's value, or the output of the Constant node.
        tensor: Its data, not yet read.
        steps: Transposes and reshapes that turn the stored array into this one.
        shape: Shape after the steps.
        dtype: The dtype the operator sees; differs from `tensor.dtype` after a Cast.
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    steps: tuple[Step, ...] = ()
    shape: tuple[int, ...]
    dtype: ir.DataType

    @property
    def name(self) -> str:
        """Name of the initializer or constant."""
        return self.root.name or ""

    @property
    def stored_dtype(self) -> ir.DataType:
        """The dtype in the file."""
        return self.tensor.dtype

    @property
    def is_overridable(self) -> bool:
        """Return whether a caller may feed another value: the initializer is a graph input too."""
        return self.root.is_graph_input()

    def transposed(self, *perm: int) -> Weight:
        """Return this weight with its axes permuted.

        Raises:
            ValueError: It has other axes.
        """
        if sorted(perm) != list(range(len(self.shape))):
            raise ValueError(f"{perm} permutes no {len(self.shape)} axes")
        steps = self.steps
        shape = tuple(self.shape[axis] for axis in perm)
        if steps and steps[-1][0] == "transpose":
            perm = tuple(steps[-1][1][axis] for axis in perm)
            steps = steps[:-1]
        if perm != tuple(range(len(perm))):
            steps = (*steps, ("transpose", perm))
        return self._with(steps, shape)

    def reshaped(self, *shape: int) -> Weight:
        """Return this weight with another shape of the same size."""
        if shape == self.shape:
            return self
        steps = self.steps
        if steps and steps[-1][0] == "reshape":
            steps = steps[:-1]
        return self._with((*steps, ("reshape", shape)), shape)

    def _with(self, steps: tuple[Step, ...], shape: tuple[int, ...]) -> Weight:
        return Weight(root=self.root, tensor=self.tensor, steps=steps, shape=shape, dtype=self.dtype)

    @property
    def is_turned(self) -> bool | None:
        """Return whether this is the stored matrix transposed, apart from axes of size 1; None if it is no matrix."""
        sizes = [int(size) for size in self.tensor.shape.numpy()]
        if sum(size != 1 for size in sizes) != 2:
            return None
        axes = [axis if size != 1 else None for axis, size in enumerate(sizes)]
        for kind, arguments in self.steps:
            if kind == "transpose":
                axes = [axes[axis] for axis in arguments]
                continue
            order = [axis for axis in axes if axis is not None]
            if [sizes[axis] for axis in order] != [size for size in arguments if size != 1]:
                return None
            left = iter(order)
            axes = [None if size == 1 else next(left) for size in arguments]
        first, second = (axis for axis in axes if axis is not None)
        return first > second

    def numpy(self) -> Array:
        """Return the array, of `shape` and `stored_dtype`."""
        array: Array = self.tensor.numpy()
        for kind, arguments in self.steps:
            array = array.transpose(arguments) if kind == "transpose" else array.reshape(arguments)
        return array

    def as_stored(self, array: Array) -> Array:
        """Return an array of `shape` in the layout of the stored tensor."""
        shapes: list[tuple[int, ...]] = [tuple(self.tensor.shape.numpy())]
        for kind, arguments in self.steps:
            shapes.append(tuple(shapes[-1][axis] for axis in arguments) if kind == "transpose" else arguments)
        for (kind, arguments), shape in zip(self.steps[::-1], shapes[-2::-1], strict=True):
            array = array.transpose(np.argsort(arguments)) if kind == "transpose" else array.reshape(shape)
        return array


def resolve(value: ir.Value | None) -> Weight | NoWeight | None:
    """Return the weight behind an operand, a refusal for other stored constants, or None for all other operands."""
    if value is None:
        return None
    root, chain = layout_chain(value)
    name = root.name or ""
    tensor = stored_tensor(root)
    if tensor is None and root.producer() is None and not root.is_graph_input():
        return NoWeight(reason="weight has no data: a sparse initializer, or a broken model", weight=name)
    if tensor is None:
        return None
    if tensor.dtype not in FLOAT_DTYPES:
        return NoWeight(reason=f"weight is stored as {tensor.dtype.name.lower()}, not as a float", weight=name)
    weight = Weight(root=root, tensor=tensor, shape=tuple(tensor.shape.numpy()), dtype=tensor.dtype)
    for node in reversed(chain):
        try:
            step = _follow(weight, node)
        except (LookupError, ValueError, TypeError, ArithmeticError, StopIteration):
            step = NoWeight(reason=f"weight goes through {node.op_type} {name_of(node)!r}, which does not fit it")
        if isinstance(step, NoWeight):
            return NoWeight(reason=step.reason, weight=name)
        weight = step
    return weight


def constant_of(value: ir.Value | None) -> Weight | None:
    """Return the constant behind an operand, of any dtype where no layout operator stands between; None without one."""
    if value is None:
        return None
    weight, tensor = resolve(value), stored_tensor(value)
    if isinstance(weight, Weight) or tensor is None:
        return weight if isinstance(weight, Weight) else None
    return Weight(root=value, tensor=tensor, shape=tuple(tensor.shape.numpy()), dtype=tensor.dtype)


def refuse_computed(value: ir.Value) -> NoWeight:
    """Return the refusal of an operand that is computed from constants but not stored."""
    root, _ = layout_chain(value)
    producer = root.producer()
    op_type = "" if producer is None else producer.op_type
    if op_type == "DequantizeLinear":
        return NoWeight(reason="weight is quantized (DequantizeLinear)")
    if op_type == "Constant" and producer is not None and any(a.is_ref() for a in producer.attributes.values()):
        return NoWeight(reason="weight is an attribute of the model function: inline functions first")
    if op_type == "Constant":
        return NoWeight(reason="weight is a sparse constant", weight=root.name or "")
    return NoWeight(reason=f"weight is computed by {op_type}: fold constants first")


def _follow(weight: Weight, node: ir.Node) -> Weight | NoWeight:
    """Apply one layout operator to a weight."""
    match node.op_type:
        case "Transpose":
            reverse = tuple(reversed(range(len(weight.shape))))
            return weight.transposed(*node.attributes.get_ints("perm", reverse))
        case "Cast":
            to = ir.DataType(node.attributes["to"].as_int())
            if weight.dtype != weight.stored_dtype or to not in FLOAT_DTYPES:
                return NoWeight(reason=f"weight goes through more than one Cast, or to {to.name.lower()}")
            return Weight(root=weight.root, tensor=weight.tensor, steps=weight.steps, shape=weight.shape, dtype=to)
        case "Reshape" | "Squeeze" | "Unsqueeze":
            shape = _new_shape(weight.shape, node)
            if shape is None:
                return NoWeight(reason=f"weight goes through {node.op_type} {name_of(node)!r} with computed arguments")
            if math.prod(shape) != math.prod(weight.shape):
                raise ValueError(f"{weight.shape} cannot become {shape}")
            return weight.reshaped(*shape)
        case _:
            return weight


def _new_shape(shape: tuple[int, ...], node: ir.Node) -> tuple[int, ...] | None:
    """Return the shape behind a Reshape, Squeeze or Unsqueeze; None when its arguments are not constant."""
    operand = node.inputs[1] if len(node.inputs) > 1 else None
    given = stored_array(operand)
    if operand is not None and given is None:
        return None
    if given is None and "axes" in node.attributes:  # before opset 13
        given = np.array(node.attributes["axes"].as_ints())
    if node.op_type == "Reshape":
        if given is None:
            return None
        keep = not node.attributes.get_int("allowzero", 0)
        target = [shape[i] if size == 0 and keep else int(size) for i, size in enumerate(given)]
        rest = math.prod(size for size in target if size != -1)
        return tuple(math.prod(shape) // max(rest, 1) if size == -1 else size for size in target)
    if node.op_type == "Squeeze":
        drop = {int(a) % len(shape) for a in given} if given is not None else {i for i, n in enumerate(shape) if n == 1}
        return tuple(size for axis, size in enumerate(shape) if axis not in drop)
    if given is None:
        return None
    rank = len(shape) + len(given)
    added, sizes = {int(axis) % rank for axis in given}, iter(shape)
    return tuple(1 if axis in added else next(sizes) for axis in range(rank))
