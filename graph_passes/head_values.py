"""The values of attention heads: all is linear between the product that makes them and the one that reads them.

    x --> op W_v, b_v --> Reshape, Transpose --> probabilities @ v --> Transpose, Reshape --> op W_o --> y

Head h makes rows (h, i) of W_v, i = 0, ..., d-1, and W_o reads them in the columns (h, i). The attention mixes
positions of the sequence, in each head and for every i alike. So d may fall to k: a split of W_o in the form "heads"
has a `right` (heads * k, heads * d) with a block R_h for each head, which `FoldUnitsPass` multiplies into W_v and b_v.

Every value between is followed as a list of axes, each a product of factors, the outermost first:

    (batch, positions, [head, number]) --> Reshape --> (batch, positions, [head], [number]) --> Transpose --> ...
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import onnx_ir as ir

from graph_passes.constants import stored_array
from graph_passes.hidden_units import (
    MOST_NODES,
    HiddenUnits,
    NoUnitsError,
    UnitAxis,
    rank_of,
    size_pieces,
    sizes_of,
    stored_axis,
)
from graph_passes.names import name_of
from graph_passes.weights import constant_of

READERS = ("MatMul", "Gemm")
"""Operators that read the values of heads, and that make them."""
SINGLE = frozenset({"Dropout", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
MICROSOFT = "com.microsoft"
_SYMBOL_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)
"""Sizes that stand for symbols, such as the batch: no size of a model is a multiple of one by chance."""


class _Factor(NamedTuple):
    label: str
    size: int


_Axes: TypeAlias = tuple[tuple[_Factor, ...], ...]


def head_values(reader: ir.Node, columns: int, *, overridable: bool = False) -> HiddenUnits:
    """Return the numbers of attention heads that a product reads at its first input, as units in the form "heads".

    Args:
        reader: MatMul or Gemm.
        columns: Entries of the axis over which it sums.
        overridable: Treat initializers that are graph inputs too as constants.

    Raises:
        NoUnitsError: It does not read the values of attention heads.
    """
    try:
        return _Path(reader=reader, columns=columns).found(overridable=overridable)
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:  # of a malformed node
        raise NoUnitsError("a node before it does not fit its inputs") from error


@dataclass(kw_only=True)
class _Path:
    """The nodes from the product that makes the values to the one that reads them."""

    reader: ir.Node
    columns: int
    units: HiddenUnits = field(default_factory=lambda: HiddenUnits(form="heads"))
    _nodes: list[tuple[ir.Node, int]] = field(default_factory=list)
    _symbols: dict[object, int] = field(default_factory=dict)

    def found(self, *, overridable: bool) -> HiddenUnits:
        """Walk back to the product that makes the values, then follow the axes forward."""
        maker = self._back()
        count = self._numbers_of_a_head()
        if count < 2 or self.columns % count:
            raise NoUnitsError(f"heads of {count} numbers do not make {self.columns}")
        units = self.units
        units.makers, units.count, units.run = [maker], count, self.columns // count
        weight = constant_of(maker.inputs[1])
        is_turned = maker.op_type == "Gemm" and bool(maker.attributes.get_int("transB", 0))
        rows = 0 if is_turned else 1
        if weight is None or weight.shape[rows] != self.columns:
            raise NoUnitsError(f"{maker.op_type} {name_of(maker)!r} does not make all values")
        self._constant(maker, 1, rows)
        self._constant(maker, 2, -1)
        value = maker.outputs[0]
        axes: _Axes = (*(self._axis(value, at) for at in range(rank_of(value) - 1)), self._values)
        self._note(value, axes)
        for node, index in reversed(self._nodes):
            axes, value = self._behind(node, index, axes), node.outputs[0]
            self._note(value, axes)
        if not axes or axes[-1] != self._values:
            raise NoUnitsError("the heads do not lie side by side in its input")
        units.refuse_shared(overridable=overridable)
        return units

    @property
    def _values(self) -> tuple[_Factor, ...]:
        """The factors of an axis that holds the values of all heads."""
        return tuple(f for f in (_Factor("head", self.units.run), _Factor("number", self.units.count)) if f.size > 1)

    def _back(self) -> ir.Node:
        """Note the nodes between, the last one first, with the input that holds values; return the product."""
        value, user = self.reader.inputs[0], self.reader
        for _ in range(MOST_NODES):
            node = None if value is None else value.producer()
            if value is None or node is None or node.graph is not self.reader.graph:
                raise NoUnitsError("its input is not made beside it")
            if len([output for output in node.outputs if output.name]) != 1 or value.is_graph_output():
                raise NoUnitsError(f"{value.name!r} is an output, or one of several")
            if [use.node for use in value.uses()] != [user]:
                raise NoUnitsError(f"others than {name_of(user)!r} read {value.name!r}")
            index = _operand(node)
            if index is None:
                return node
            self._nodes.append((node, index))
            value, user = node.inputs[index], node
        raise NoUnitsError("too many nodes stand before it")

    def _numbers_of_a_head(self) -> int:
        """Return how many numbers the attention reads of each head."""
        attentions = [(node, index) for node, index in self._nodes if _is_attention(node)]
        if len(attentions) != 1:
            raise NoUnitsError("not one attention stands before it")
        ((node, index),) = attentions
        self.units.between = [node]
        if (heads := _heads_of_rows(node)) > 0:
            return self.columns // heads if self.columns % heads == 0 else 0
        value = node.inputs[index]
        size = None if value is None or value.shape is None or not value.shape else value.shape[-1]
        if not isinstance(size, int):
            raise NoUnitsError(f"the shape of the values of {name_of(node)!r} is unknown: infer shapes first")
        return size

    def _constant(self, node: ir.Node, index: int, axis: int) -> None:
        """Note a constant with a number for each value along an axis."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        weight = constant_of(value)
        place = None if weight is None or not weight.shape else stored_axis(weight, axis % len(weight.shape))
        if weight is None or place is None or weight.shape[axis] != self.columns:
            raise NoUnitsError(f"{value.name!r} has no number for each value of a head")
        self.units.constants[node, index] = weight, UnitAxis(place, self.units.run)

    def _note(self, value: ir.Value, axes: _Axes) -> None:
        """Note the axis along which a value holds the numbers of a head."""
        (at,) = [at for at, axis in enumerate(axes) if any(factor.label == "number" for factor in axis)]
        if rank_of(value) != len(axes):
            raise NoUnitsError(f"{value.name!r} has another number of axes than its node makes")
        self.units.values[value] = UnitAxis(at, _size(axes[at]) // self.units.count)

    def _axis(self, value: ir.Value | None, at: int) -> tuple[_Factor, ...]:
        """Return an axis of a value that holds none of the values."""
        if value is None or value.shape is None or not -len(value.shape) <= at < len(value.shape):
            raise NoUnitsError("the shape of a value is unknown: infer shapes first")
        size = value.shape[at]
        if not isinstance(size, int):
            symbol = size.value or (value, at % len(value.shape))
            size = _SYMBOL_SIZES[self._symbols.setdefault(symbol, len(self._symbols))]
        return (_Factor("", size),) if size != 1 else ()

    def _behind(self, node: ir.Node, index: int, axes: _Axes) -> _Axes:
        """Return the axes of a node's output."""
        if _is_attention(node):
            return self._behind_attention(node, axes)
        match node.op_type:
            case "Transpose":
                perm = node.attributes.get_ints("perm", tuple(reversed(range(len(axes)))))
                return tuple(axes[at] for at in perm)
            case "Reshape":
                return self._reshaped(node, axes)
            case "Squeeze" | "Unsqueeze":
                return self._squeezed(node, axes)
            case "Add":
                if axes[-1:] != (self._values,) or rank_of(node.inputs[1 - index]) > len(axes):
                    raise NoUnitsError(f"Add {name_of(node)!r} adds to heads apart")
                self._constant(node, 1 - index, -1)
        return axes

    def _squeezed(self, node: ir.Node, axes: _Axes) -> _Axes:
        """Return the axes behind a Squeeze or Unsqueeze with constant axes."""
        written = sizes_of(node) if len(node.inputs) > 1 else list(node.attributes.get_ints("axes", ()))
        if not written:
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} has no constant axes")
        if node.op_type == "Squeeze":
            gone = {at % len(axes) for at in written}
            if any(axes[at] for at in gone):
                raise NoUnitsError(f"Squeeze {name_of(node)!r} drops an axis that may be long")
            return tuple(axis for at, axis in enumerate(axes) if at not in gone)
        rank = len(axes) + len(written)
        new, old = {at % rank for at in written}, iter(axes)
        return tuple(() if at in new else next(old) for at in range(rank))

    def _reshaped(self, node: ir.Node, axes: _Axes) -> _Axes:
        """Return the axes behind a Reshape, and note the size that falls with the numbers of a head."""
        sizes = self._sizes(node)
        copied = [] if node.attributes.get_int("allowzero", 0) else [at for at, size in enumerate(sizes) if size == 0]
        target = [_size(axes[at]) if at in copied else size for at, size in enumerate(sizes)]
        factors = [factor for axis in axes for factor in axis]
        if -1 in target:
            known = max(math.prod(size for size in target if size != -1), 1)
            factors = _divisible(factors, known)
            target[target.index(-1)] = _size(factors) // known
        made = _regrouped(factors, target)
        if any(made[at] != axes[at] for at in copied):
            raise NoUnitsError(f"Reshape {name_of(node)!r} copies another size")
        (at,) = [at for at, axis in enumerate(made) if any(factor.label == "number" for factor in axis)]
        if sizes[at] > 0:
            self.units.reshapes[node] = UnitAxis(at, _size(made[at]) // self.units.count)
        return made

    def _sizes(self, node: ir.Node) -> list[int]:
        """Return the sizes of a Reshape, with stand-ins for computed ones."""
        sizes: list[int] = []
        for value, array in size_pieces(node):
            if array is None:
                origin = _dimension(value) or (node.outputs[0], len(sizes))
                sizes.append(_size(self._axis(*origin)))
            else:
                sizes += [int(size) for size in array]
        if not sizes:
            raise NoUnitsError(f"Reshape {name_of(node)!r} has computed sizes")
        return sizes

    def _behind_attention(self, node: ir.Node, axes: _Axes) -> _Axes:
        """Return the axes behind the product of the probabilities, or the fused attention, with the values."""
        number = (_Factor("number", self.units.count),)
        queries = node.inputs[0]
        if node.op_type != "MatMul":
            if _heads_of_rows(node) > 0:
                if axes[-1] != self._values or len(axes) != 3:
                    raise NoUnitsError(f"{node.op_type} {name_of(node)!r} does not read the heads side by side")
                return axes[0], self._axis(queries, 1), axes[2]
            if len(axes) != 4 or queries is None or queries.shape is None or queries.shape[1] != self.units.run:
                raise NoUnitsError(f"{node.op_type} {name_of(node)!r} has another number of heads")
        if len(axes) < 2 or axes[-1] != number or queries is None or rank_of(queries) < 2:
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} does not mix the positions of heads")
        rank = max(len(axes), rank_of(queries))
        values = ((),) * (rank - len(axes)) + axes
        batch = [
            values[at] or self._axis(queries, at - rank) if rank_of(queries) >= rank - at else values[at]
            for at in range(rank - 2)
        ]
        return *batch, self._axis(queries, -2), number


def _dimension(size: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return the value and the axis whose size is computed; None where it is computed otherwise."""
    node = None if size is None else size.producer()
    data = None if node is None or not node.inputs else node.inputs[0]
    if node is None or data is None or node.domain != "":
        return None
    if node.op_type in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return _dimension(data)
    if node.op_type == "Shape" and data.shape is not None:
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(data.shape))
        return (data, start) if range(*slice(start, end).indices(len(data.shape)))[1:] == range(0) else None
    shape = data.producer()
    index = stored_array(node.inputs[1]) if node.op_type == "Gather" else None
    if shape is None or shape.op_type != "Shape" or index is None or index.size != 1 or "start" in shape.attributes:
        return None
    return None if shape.inputs[0] is None else (shape.inputs[0], int(index.reshape(-1)[0]))


def _operand(node: ir.Node) -> int | None:
    """Return the input of a node that may hold values of heads; None for a product that may make them.

    Raises:
        NoUnitsError: The node is not linear in any input, or has another effect on each number.
    """
    constants = [at for at, value in enumerate(node.inputs) if constant_of(value) is not None]
    is_onnx = node.domain in ("", "ai.onnx")
    if is_onnx and node.op_type in READERS and constants[:1] == [1]:
        weight = constant_of(node.inputs[1])
        if weight is not None and len(weight.shape) == 2:
            return None
    if _is_attention(node):
        return 2 if node.op_type != "MatMul" else 1
    if is_onnx and node.op_type in SINGLE and not (node.op_type == "Dropout" and len(node.inputs) > 2):
        return 0
    if is_onnx and node.op_type == "Add" and len(constants) == 1:
        return 1 - constants[0]
    raise NoUnitsError(f"{node.op_type} {name_of(node)!r} stands between")


def _is_attention(node: ir.Node) -> bool:
    """Return whether a node multiplies values by probabilities, and does so for every number of a head alike."""
    there = [at for at, value in enumerate(node.inputs) if value is not None]
    if node.domain == MICROSOFT and node.op_type == "MultiHeadAttention":
        return there[:3] == [0, 1, 2] and not set(there) & {3, 6, 7} and _rank_is(node.inputs[2], 3)
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Attention":
        return there[:3] == [0, 1, 2] and not set(there) & {4, 5}
    return node.op_type == "MatMul" and all(constant_of(value) is None for value in node.inputs)


def _heads_of_rows(node: ir.Node) -> int:
    """Return the number of heads of a fused attention that reads them side by side in rows; 0 for others.

    Raises:
        NoUnitsError: Several heads of queries share one of values.
    """
    if node.op_type == "MultiHeadAttention":
        return node.attributes.get_int("num_heads", 0)
    if node.op_type != "Attention" or not _rank_is(node.inputs[2], 3):
        return 0
    heads = node.attributes.get_int("kv_num_heads", 0)
    if heads != node.attributes.get_int("q_num_heads", 0):
        raise NoUnitsError(f"Attention {name_of(node)!r} has fewer heads of values than of queries")
    return heads


def _rank_is(value: ir.Value | None, rank: int) -> bool:
    return value is not None and value.shape is not None and len(value.shape) == rank


def _size(axis: Sequence[_Factor]) -> int:
    return math.prod(factor.size for factor in axis)


def _divisible(factors: Sequence[_Factor], size: int) -> list[_Factor]:
    """Return the factors with another stand-in for a symbol, so that `size` divides their product."""
    missing = size // math.gcd(size, _size(factors))
    made = list(factors)
    open_ = [at for at, f in enumerate(made) if f.label == "" and any(f.size % each == 0 for each in _SYMBOL_SIZES)]
    if missing > 1 and open_:
        made[open_[0]] = _Factor("", made[open_[0]].size * missing)
    return made


def _regrouped(factors: Sequence[_Factor], sizes: Sequence[int]) -> _Axes:
    """Return the axes of other sizes that hold the same factors in the same order.

    Raises:
        NoUnitsError: A size cuts through the heads, or through the numbers of one.
    """
    left, made = list(factors), []
    for size in sizes:
        axis: list[_Factor] = []
        while size > 1:
            label, length = left.pop(0) if left else _Factor("", 0)
            if length and size % length == 0:
                axis.append(_Factor(label, length))
                size //= length
            elif length and label == "" and length % size == 0:
                axis.append(_Factor("", size))
                left.insert(0, _Factor("", length // size))
                size = 1
            else:
                raise NoUnitsError("a Reshape cuts through heads")
        made.append(tuple(axis))
    if left or any(size < 1 for size in sizes):
        raise NoUnitsError("a Reshape does not fit its input")
    return tuple(made)
