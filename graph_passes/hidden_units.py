"""Hidden units: the entries of the axis over which a product sums, where other products make each of them alone.

    x --> op W, b --> activation --> op V, c --> y              unit i: row i of W and b, column i of V

Everything between works entry by entry: activations, gates (two products that are multiplied), depthwise Convs,
pooling, BatchNormalization, Flatten. Nothing else reads the values between. So a unit that V does not read can go: the
products become smaller, and no node is added. A split of V in the form "units" says which units stay:

    a --> op right --> op left --> y       right (kept, units): rows of the identity       left: V, fitted to them

`FoldUnitsPass` removes its first node, and with it the other units. `graph_passes.head_values` finds the numbers of
attention heads in the same way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import numpy as np
import onnx_ir as ir

from graph_passes.axis_rules.pointwise import ELEMENTWISE
from graph_passes.cleanup import other_consumers, remove_unused
from graph_passes.constants import add_constant, lazily, set_constant, stored_array
from graph_passes.forms import Form
from graph_passes.names import name_of
from graph_passes.records import Array, Units
from graph_passes.weights import Weight, constant_of

READERS = ("MatMul", "Gemm", "Conv")
"""Operators that read units, and that make them."""
POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})
REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
MOST_NODES = 64
"""Largest number of nodes between two products."""

_Use: TypeAlias = tuple[ir.Node, int]


class NoUnitsError(Exception):
    """Says why a product reads nothing that could be removed before it."""


@dataclass(frozen=True)
class UnitAxis:
    """The axis of a value or constant that holds the units, each `run` entries long."""

    number: int
    run: int = 1

    def entries(self, kept: Array) -> Array:
        """Return the places of the kept units' entries along the axis."""
        return (kept[:, None] * self.run + np.arange(self.run)).reshape(-1)


@dataclass(kw_only=True)
class HiddenUnits:
    """The hidden units that a product reads.

    Attributes:
        form: Form of the splits that remove some: in the form "heads", unit i is number i of every head.
        count: Number of units.
        run: Columns of the product's weight for each unit: more than one behind a Flatten, or with more than one head.
        makers: The products that make them.
        between: The other nodes that multiply and accumulate for each of them: depthwise Convs, or the attention.
        values: The values that hold them.
        constants: Uses of constants with entries for each unit -> the constant and its stored axis.
        reshapes: Reshapes to a fixed number of entries -> the axis.
    """

    form: Form = "units"
    count: int = 0
    run: int = 1
    makers: list[ir.Node] = field(default_factory=list)
    between: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, UnitAxis] = field(default_factory=dict)
    constants: dict[_Use, tuple[Weight, UnitAxis]] = field(default_factory=dict)
    reshapes: dict[ir.Node, UnitAxis] = field(default_factory=dict)

    def facts(self) -> Units:
        """Return what a planner needs to know."""
        weights = [self.constants[node, 1][0] for node in self.makers]
        numbers = sum(weight.tensor.size for weight, _ in self.constants.values()) // self.count
        return Units(
            form=self.form,
            count=self.count,
            run=self.run,
            makers=tuple(weight.name for weight in weights),
            nodes=tuple(map(name_of, (*self.makers, *self.between))),
            numbers=numbers,
            beside=numbers - sum(weight.tensor.size for weight in weights) // self.count,
        )

    def keep_(self, right: Array) -> None:
        """Let the nodes make only what `right (rank, columns)` takes of the units.

        Raises:
            NoUnitsError: The nodes cannot make it: it takes a part of a unit, or mixes heads.
        """
        make = _selected(right, self.run) if self.form == "units" else _multiplied(right, self.run)
        kept = len(right) // self.run
        for weight, axis in {weight.root: (weight, axis) for weight, axis in self.constants.values()}.values():
            set_constant(weight.root, _made(weight.tensor, axis, kept, make))
        for node in self.between:
            if node.op_type == "Conv":
                node.attributes["group"] = ir.AttrInt64("group", kept)
        for value, axis in self.values.items():
            _resize(value, axis, kept)
        for node, axis in self.reshapes.items():
            _set_size(node, axis.number, kept * axis.run)

    def refuse_shared(self, *, overridable: bool) -> None:
        """Check that nothing else reads the constants.

        Args:
            overridable: Treat initializers that are graph inputs too as constants.

        Raises:
            NoUnitsError: Something does.
        """
        for weight, axis in self.constants.values():
            if weight.is_overridable and not overridable:
                raise NoUnitsError(f"{weight.name!r} is a graph input too")
            for user, index in other_consumers(weight.root):
                other = None if user is None else self.constants.get((user, index))
                if other is None or (other[1], other[0].steps) != (axis, weight.steps):
                    raise NoUnitsError(f"{weight.name!r} has other users")


def hidden_units(reader: ir.Node, columns: int, *, overridable: bool = False) -> HiddenUnits:
    """Return the hidden units that a product reads at its first input.

    Args:
        reader: MatMul, Gemm or Conv.
        columns: Entries of the axis over which it sums.
        overridable: Treat initializers that are graph inputs too as constants.

    Raises:
        NoUnitsError: It has none.
    """
    walk = _Walk(reader=reader, columns=columns, overridable=overridable)
    walk.run()
    return walk.found


@dataclass(kw_only=True)
class _Walk:
    """The way back from a product to those that make its units."""

    reader: ir.Node
    columns: int
    overridable: bool
    found: HiddenUnits = field(default_factory=HiddenUnits)
    _between: set[ir.Node] = field(default_factory=set)
    _pending: list[tuple[ir.Value, int, bool]] = field(default_factory=list)
    _axes: dict[ir.Value, tuple[int, bool]] = field(default_factory=dict)
    _uses: dict[_Use, tuple[int, bool]] = field(default_factory=dict)
    """Constants that may hold units -> the axis, counted from the end, and whether behind a Flatten."""

    def run(self) -> None:
        data = self.reader.inputs[0]
        if data is None:
            raise NoUnitsError("it has no data")
        self._back(data, 1 if self.reader.op_type == "Conv" else rank_of(data) - 1, flat=True)
        while self._pending:
            value, axis, flat = self._pending.pop()
            self._step(value, axis, flat=flat)
        self._finish(data)

    def _back(self, value: ir.Value | None, axis: int, *, flat: bool) -> None:
        """Look at a value next; `flat` if every unit may have more than one entry there."""
        if value is None or axis < 0:
            raise NoUnitsError("a value between does not hold the units")
        if value in self._axes:
            if self._axes[value] != (axis, flat):
                raise NoUnitsError(f"{value.name!r} holds the units along two axes")
            return
        if len(self._axes) > MOST_NODES:
            raise NoUnitsError("too many nodes stand before it")
        if value.is_graph_output() or value.is_graph_input():
            raise NoUnitsError(f"{value.name!r} is an input or output of the graph")
        self._axes[value] = axis, flat
        self._pending.append((value, axis, flat))

    def _step(self, value: ir.Value, axis: int, *, flat: bool) -> None:
        """Go from a value to what its node reads."""
        node = value.producer()
        if node is None or node.graph is not self.reader.graph or len([v for v in node.outputs if v.name]) != 1:
            raise NoUnitsError(f"{value.name!r} is not made by one node beside it")
        operator, data = node.op_type, node.inputs[0] if node.inputs else None
        is_onnx = node.domain in ("", "ai.onnx")
        if is_onnx and operator in READERS and self._is_made(node, axis):
            return
        self._between.add(node)
        if is_onnx and operator == "Conv":
            self._depthwise(node, axis)
        elif is_onnx and operator == "BatchNormalization" and axis == 1:
            for index in range(1, 5):
                self._constant(node, index, 0, flat=flat)
            self._back(data, axis, flat=flat)
        elif ("" if is_onnx else node.domain, operator) in ELEMENTWISE:
            for index, operand in enumerate(node.inputs):
                if operand is None:
                    continue
                if constant_of(operand) is not None:
                    self._uses[node, index] = axis - rank_of(value), flat
                else:
                    self._back(operand, axis - rank_of(value) + rank_of(operand), flat=flat)
        elif is_onnx and (self._is_pool(node, axis) or (operator == "Dropout" and len(node.inputs) < 3)):
            self._back(data, axis, flat=flat)
        elif is_onnx and operator in REDUCTIONS:
            self._back(data, self._before_reduction(node, axis), flat=flat)
        elif is_onnx and operator == "Transpose":
            self._back(data, node.attributes.get_ints("perm", tuple(reversed(range(rank_of(value)))))[axis], flat=flat)
        elif is_onnx and operator in ("Flatten", "Reshape") and flat and axis == 1 == rank_of(value) - 1:
            self._flattened(node)
        else:
            raise NoUnitsError(f"{operator} {name_of(node)!r} stands between")

    def _is_pool(self, node: ir.Node, axis: int) -> bool:
        return node.op_type in POOLS and axis == 1 and rank_of(node.outputs[0]) > 2

    def _is_made(self, node: ir.Node, axis: int) -> bool:
        """Note a product that makes the units; return whether it is one."""
        weight = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
        if weight is None or (node.op_type == "Conv" and node.attributes.get_int("group", 1) != 1):
            return False
        if node.op_type != "Conv" and len(weight.shape) != 2:
            return False
        is_turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        rows = 0 if node.op_type == "Conv" or is_turned else 1
        place = 1 if node.op_type == "Conv" else rank_of(node.outputs[0]) - 1
        if axis != place or self.found.count not in (0, weight.shape[rows]):
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} does not make one unit in each row")
        self.found.count = weight.shape[rows]
        self.found.makers.append(node)
        self._constant(node, 1, rows, flat=False)
        self._constant(node, 2, 0 if node.op_type == "Conv" else -1, flat=False)
        return True

    def _depthwise(self, node: ir.Node, axis: int) -> None:
        weight = constant_of(node.inputs[1])
        if weight is None or axis != 1 or weight.shape[:2] != (node.attributes.get_int("group", 1), 1):
            raise NoUnitsError(f"Conv {name_of(node)!r} stands between")
        self.found.between.append(node)
        for index in (1, 2):
            self._constant(node, index, 0, flat=False)
        self._back(node.inputs[0], 1, flat=False)

    def _constant(self, node: ir.Node, index: int, axis: int, *, flat: bool) -> None:
        """Note an operand that must be constant or missing; `axis` may count from the end."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        weight = constant_of(value)
        if weight is None:
            raise NoUnitsError(f"{value.name!r} is no constant")
        self._uses[node, index] = axis - len(weight.shape) if axis >= 0 else axis, flat

    def _before_reduction(self, node: ir.Node, axis: int) -> int:
        """Return the axis of the units before a reduction over other axes."""
        data = node.inputs[0]
        axes = stored_array(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = np.array(node.attributes.get_ints("axes", ())) if axes is None else axes
        if data is None or not axes.size:
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} reduces every axis")
        reduced = {int(each) % rank_of(data) for each in axes}
        left = [each for each in range(rank_of(data)) if each not in reduced]
        before = axis if node.attributes.get_int("keepdims", 1) else left[axis]
        if before in reduced:
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} joins the units")
        return before

    def _flattened(self, node: ir.Node) -> None:
        """Go behind a Flatten, or a Reshape that does the same."""
        data = node.inputs[0]
        entries = None if data is None or data.shape is None else tuple(data.shape)[1:]
        if entries is None or not all(isinstance(each, int) for each in entries):
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} flattens unknown sizes")
        if math.prod(cast(tuple[int, ...], entries)) != self.columns:
            raise NoUnitsError(f"{node.op_type} {name_of(node)!r} does not keep samples apart")
        if node.op_type == "Flatten" and node.attributes.get_int("axis", 1) != 1:
            raise NoUnitsError(f"Flatten {name_of(node)!r} does not keep samples apart")
        if node.op_type == "Reshape":
            sizes = sizes_of(node)
            if len(sizes) != 2:
                raise NoUnitsError(f"Reshape {name_of(node)!r} has computed sizes")
            if sizes[1] != -1:
                self.found.reshapes[node] = UnitAxis(1)
        self._back(data, 1, flat=False)

    def _finish(self, data: ir.Value) -> None:
        """Check that nothing else reads the units or their constants, and note the latter."""
        found, behind = self.found, self._between | {self.reader}
        if found.count < 2 or self.columns % found.count:
            raise NoUnitsError("no product makes its inputs one by one")
        found.run = self.columns // found.count
        if found.run > 1 and all(flat for _, flat in self._axes.values()):
            raise NoUnitsError("no product makes its units one by one")
        is_flat = found.run > 1
        for value, (axis, flat) in self._axes.items():
            for user, index in value.uses():
                if user not in behind or (user is self.reader and (index or value is not data)):
                    raise NoUnitsError(f"{user.op_type} {name_of(user)!r} reads {value.name!r} too")
            found.values[value] = UnitAxis(axis, found.run if flat and is_flat else 1)
        for (node, index), (axis, flat) in self._uses.items():
            run = found.run if flat and is_flat else 1
            weight = constant_of(node.inputs[index])
            if weight is None or len(weight.shape) < -axis or weight.shape[axis] == 1:
                continue
            place = stored_axis(weight, axis % len(weight.shape))
            if weight.shape[axis] != found.count * run or place is None:
                raise NoUnitsError(f"{weight.name!r} of shape {weight.shape} does not fit {found.count} units")
            found.constants[node, index] = weight, UnitAxis(place, run)
        found.reshapes = dict.fromkeys(found.reshapes, UnitAxis(1, found.run))
        found.refuse_shared(overridable=self.overridable)


def rank_of(value: ir.Value | None) -> int:
    """Return the number of axes of a value.

    Raises:
        NoUnitsError: It is not known.
    """
    if value is None or value.shape is None:
        name = "a value" if value is None else repr(value.name)
        raise NoUnitsError(f"the shape of {name} is unknown: infer shapes first")
    return len(value.shape)


def sizes_of(node: ir.Node) -> list[int]:
    """Return the constant sizes of a Reshape; [] where they are computed."""
    sizes = stored_array(node.inputs[1])
    return [] if sizes is None else [int(size) for size in sizes.reshape(-1)]


def size_pieces(node: ir.Node) -> list[tuple[ir.Value, Array | None]]:
    """Return the parts of a Reshape's sizes, in order, each with its numbers, or None for a single computed size.

    They are one constant, or a Concat. [] for sizes that are computed otherwise.
    """
    sizes = node.inputs[1]
    concat = None if sizes is None else sizes.producer()
    if sizes is None or (array := stored_array(sizes)) is not None:
        return [] if sizes is None or array is None else [(sizes, array.reshape(-1))]
    if concat is None or concat.op_type != "Concat" or concat.domain != "":
        return []
    parts = [(value, stored_array(value)) for value in concat.inputs if value is not None]
    is_known = [array is not None or (value.shape is not None and tuple(value.shape) == (1,)) for value, array in parts]
    return parts if all(is_known) else []


def _set_size(node: ir.Node, place: int, size: int) -> None:
    """Give a Reshape another constant size."""
    old, values, at = node.inputs[1], [], 0
    name = f"{node.outputs[0].name}/sizes"
    for value, array in size_pieces(node):
        length = 1 if array is None else len(array)
        if array is not None and at <= place < at + length:
            array = array.astype(np.int64)
            array[place - at] = size
            value = add_constant(array, name, node, as_node=True)
        values.append(value)
        at += length
    if len(values) > 1:
        joined = ir.Value(name=f"{name}/concat", shape=ir.Shape([at]), type=ir.TensorType(ir.DataType.INT64))
        node.prepend(ir.Node("", "Concat", values, [ir.AttrInt64("axis", 0)], outputs=[joined], name=joined.name))
        values = [joined]
    node.replace_input_with(1, values[0])
    remove_unused(old)


def stored_axis(weight: Weight, axis: int) -> int | None:
    """Return the axis of the stored tensor, None behind a Reshape."""
    for kind, arguments in reversed(weight.steps):
        if kind != "transpose":
            return None
        axis = arguments[axis]
    return axis


_Make: TypeAlias = Callable[[Array, UnitAxis], Array]


def _selected(right: Array, run: int) -> _Make:
    """Return the function that takes the entries of the units that a selection keeps."""
    places = right.argmax(axis=1)
    if not np.array_equal(right, np.eye(right.shape[1], dtype=right.dtype)[places]):
        raise NoUnitsError("its weight selects no inputs")
    kept = places[::run] // run
    if not np.array_equal(UnitAxis(0, run).entries(kept), places):
        raise NoUnitsError("it selects a part of a unit")
    return lambda array, axis: array.take(axis.entries(kept), axis.number)


def _multiplied(right: Array, heads: int) -> _Make:
    """Return the function that multiplies the numbers of each head, in neighbouring entries, by its block."""
    if len(right) % heads:
        raise NoUnitsError("it does not take the same number from every head")
    blocks = right.astype(np.float64).reshape(heads, len(right) // heads, heads, -1)
    own = blocks[np.arange(heads), :, np.arange(heads)]  # (heads, kept, count)
    if np.count_nonzero(own) < np.count_nonzero(right):
        raise NoUnitsError("its weight mixes heads")

    def make(array: Array, axis: UnitAxis) -> Array:
        front = np.moveaxis(array, axis.number, 0)
        made = own @ front.astype(np.float64).reshape(heads, own.shape[2], -1)
        return np.moveaxis(made.reshape(-1, *front.shape[1:]), 0, axis.number).astype(array.dtype)

    return make


def _made(tensor: ir.TensorProtocol, axis: UnitAxis, kept: int, make: _Make) -> ir.TensorProtocol:
    """Return a tensor with the entries of fewer units; computed when it is saved if it lies in a file."""
    dims = [int(size) for size in tensor.shape.numpy()]
    dims[axis.number] = kept * axis.run
    return lazily(tensor, lambda: make(tensor.numpy(), axis), dims)


def _resize(value: ir.Value, axis: UnitAxis, kept: int) -> None:
    assert value.shape is not None
    dims = list(value.shape)
    dims[axis.number] = kept * axis.run
    value.shape = ir.Shape(dims)
