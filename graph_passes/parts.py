"""The parts of a rewrite: the factors and the bias as operands, and the first of the two nodes.

Nodes that share a weight share its factors; nodes that are split jointly share the first node too. Each factor of a
matrix is stored once, also where some nodes use the matrix transposed or in another layout:

    W ~ left @ right, W^T ~ right^T @ left^T       right --> MatMul        right --> Transpose --> MatMul
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from graph_passes.constants import OVERRIDABLE_IR_VERSION, add_constant
from graph_passes.marks import MARK
from graph_passes.names import Names, name_of, stem
from graph_passes.records import Array, Form, Keep, SplitFactors
from graph_passes.survey import Found, WeightKey
from graph_passes.weights import Weight

Side: TypeAlias = Literal["left", "right"]


class Store:
    """The constants that were made so far, so that nodes that share a weight share its factors.

    Args:
        model: The model that gets the constants.
        keep: Stores their numbers.
        overridable: Treat values that are graph inputs too as constants; always so before IR version 4.
    """

    def __init__(self, model: ir.Model, keep: Keep, *, overridable: bool) -> None:
        self.names = Names(model)
        self.opset = model.opset_imports.get("", 0)
        self.overridable = overridable or model.ir_version < OVERRIDABLE_IR_VERSION
        self._keep = keep
        self._always_nodes = model.ir_version < OVERRIDABLE_IR_VERSION
        self._values: dict[WeightKey, dict[Hashable, ir.Value]] = {}

    def made(self, weight: WeightKey, what: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """Return a constant that belongs to a weight; the first call makes it."""
        values = self._values.setdefault(weight, {})
        if what not in values:
            values[what] = make()
        return values[what]

    def known(self, weight: WeightKey, what: Hashable) -> ir.Value | None:
        """Return a constant that was made for a weight before, or None."""
        return self._values.get(weight, {}).get(what)

    def add(self, array: Array, name: str, before: ir.Node, *, as_node: bool) -> ir.Value:
        """Add a new constant under a free name; as a node for a function, which holds no initializers."""
        array = np.ascontiguousarray(array)
        return add_constant(array, name, before, as_node=self._always_nodes or as_node, keep=self._keep)

    def forget(self, weight: WeightKey) -> None:
        """Drop the factors of a weight that no later node needs."""
        self._values.pop(weight, None)


def _place(root: ir.Value) -> ir.Node:
    """Return a node in front of which a new constant is visible wherever this one is."""
    return root.producer() or next(iter(root.graph or ()))


def resized(value: ir.Value, axis: int, size: int) -> ir.Shape | None:
    """Return the shape of a value with another size along one axis; None where the shape is unknown."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):  # a file may declare any shape
        return None
    dims = list(value.shape)
    dims[axis] = size
    return ir.Shape(dims)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The factors as operands, and the first node.

    Attributes:
        found: The node to split.
        factors: The factors of its weight.
        store: The constants made so far.
        joined: First node of a joint split that another member has made.
        transposed: Whether these factors are those of the transpose of the matrix whose constants are stored.
    """

    found: Found
    factors: SplitFactors
    store: Store
    joined: ir.Node | None = None
    transposed: bool = False

    @property
    def form(self) -> Form:
        """The form of the split; the default one where another operator, of another form, shares the weight."""
        forms = self.found.site.forms
        return next((form for form in forms if form == self.factors.form), forms[0])

    def operand(self, side: Side, shape: Sequence[int], *, matrices: int = 0, turned: bool = False) -> ir.Value:
        """Return a factor as a node input.

        Args:
            side: "left" or "right".
            shape: The shape in which it is stored.
            matrices: First cut it by rows into that many matrices; 0 keeps one a group.
            turned: Then swap its last two axes.
        """
        if side == "right" and self.joined is not None and (right := self.joined.inputs[1]) is not None:
            return right
        factor = self.factors.right if side == "right" else self.factors.left
        array = factor.reshape(matrices, -1, factor.shape[-1]) if matrices else factor
        array = (array.swapaxes(-1, -2) if turned else array).reshape(shape)
        if self.found.is_turned is None:
            what = side, tuple(shape), matrices, turned
            value = self.store.made(self.found.key, what, lambda: self._beside_weight(array, side))
        else:
            value = self._matrix(array, side, turned=turned and not matrices)
        return self._as_seen(value, shape, self.found.weight)

    def _matrix(self, array: Array, side: Side, *, turned: bool) -> ir.Value:
        """Store a factor of a single matrix once, as its first node needs it; transpose and reshape it for others."""
        rows, columns = (self.factors.left if side == "left" else self.factors.right).shape[1:]
        needed = (columns, rows) if turned else (rows, columns)
        what: tuple[Side, bool] = (side, turned)
        if self.transposed:
            what = "left" if side == "right" else "right", not turned
        other = self.store.known(self.found.key, (what[0], not what[1]))
        if other is None:
            value = self.store.made(self.found.key, what, lambda: self._beside_weight(array, side))
        else:
            perm = ir.AttrInt64s("perm", (1, 0))
            value = self._laid_out("Transpose", [self._reshaped(other, needed[::-1])], needed, [perm])
        return self._reshaped(value, array.shape)

    def _reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """Return a factor in another shape, behind a Reshape where it differs."""
        if value.shape is not None and tuple(value.shape) == shape:
            return value
        name = self.store.names.fresh_value(f"{value.name}/shape")
        sizes = add_constant(np.array(shape, np.int64), name, self.found.node, as_node=True)
        return self._laid_out("Reshape", [value, sizes], shape)

    def bias(self, shape: tuple[int, ...], scale: float = 1.0) -> ir.Value:
        """Return the bias correction as a node input, in a shape, times a number."""
        value = self.store.made(
            self.found.key,
            ("bias", shape, scale),
            lambda: self._beside_weight(self._scaled_bias(shape, scale).astype(self.factors.left.dtype), "bias"),
        )
        return self._as_seen(value, shape, self.found.weight)

    def corrected(self, old: Weight, shape: tuple[int, ...], scale: float, *, before: ir.Node | None) -> ir.Value:
        """Return `old + scale * bias` as a node input.

        Args:
            old: A constant.
            shape: The shape of the bias, to be broadcast.
            scale: What the bias is multiplied by.
            before: The only user of the constant, whose name is free again; None where there are others.
        """

        def make() -> ir.Value:
            total = old.numpy().astype(np.float64) + self._scaled_bias(shape, scale)
            array = total.astype(old.stored_dtype.numpy())
            name = old.name if before is not None else self.store.names.fresh_value(old.name)
            place = before or _place(old.root)
            return self.store.add(array, name, place, as_node=self.found.in_function)

        value = self.store.made(self.found.key, ("bias", old.root, old.steps, shape, scale), make)
        return self._as_seen(value, np.broadcast_shapes(old.shape, shape), old)

    def constant(self, array: Array, kind: str) -> ir.Value:
        """Return a new constant as a node input: a bias in the dtype of the weight, or integers."""
        if not np.issubdtype(array.dtype, np.floating):
            return self._beside_weight(array, kind)
        value = self._beside_weight(array.astype(self.factors.left.dtype), kind)
        return self._as_seen(value, array.shape, self.found.weight)

    def _scaled_bias(self, shape: tuple[int, ...], scale: float) -> Array:
        if self.factors.bias is None:
            raise ValueError(f"{self.found.site.node!r} has no bias correction")
        return self.factors.bias.astype(np.float64).reshape(shape) * scale

    def _beside_weight(self, array: Array, kind: str) -> ir.Value:
        """Add a new constant beside the weight, named after it."""
        weight = self.found.weight
        name = self.store.names.fresh_value(f"{stem(weight.name)}.{kind}")
        return self.store.add(array, name, _place(weight.root), as_node=self.found.in_function)

    def _as_seen(self, value: ir.Value, shape: Sequence[int], old: Weight) -> ir.Value:
        """Cast a constant to the dtype in which the operator reads the old one."""
        if old.dtype == old.stored_dtype:
            return value
        cast = [ir.AttrInt64("to", old.dtype)]
        return self._laid_out("Cast", [value], tuple(shape), cast, dtype=old.dtype)

    def _laid_out(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: tuple[int, ...],
        attributes: Sequence[ir.Attr] = (),
        *,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Put the first of the inputs through a layout operator in front of the node; its dtype stays by default."""
        node, names = self.found.node, self.store.names
        name = f"{inputs[0].name}/{op_type.lower()}"
        layout = ir.Node("", op_type, inputs, attributes, name=names.fresh_node(f"{name_of(node)}/{op_type.lower()}"))
        value = layout.outputs[0]
        value.name, value.shape, value.type = names.fresh_value(name), ir.Shape(shape), inputs[0].type
        if dtype is not None:
            value.type = ir.TensorType(dtype)
        if self.found.in_function:  # functions carry types only since IR version 10
            value.type = None
        node.prepend(layout)
        return value

    def first(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        shape: ir.Shape | None,
        domain: str = "",
    ) -> ir.Node:
        """Insert the first node in front of the found one, unless a joint split has one.

        Args:
            op_type: Its operator.
            inputs: Data and right factor.
            attributes: Its attributes.
            shape: Shape of its output, where known.
            domain: Domain of the operator.
        """
        if self.joined is not None:
            return self.joined
        node, names = self.found.node, self.store.names
        value = ir.Value(name=names.fresh_value(f"{node.outputs[0].name}/right"), shape=shape)
        if not self.found.in_function:
            value.type = ir.TensorType(self.found.weight.dtype)
        first = ir.Node(
            domain,
            op_type,
            inputs,
            attributes,
            outputs=[value],
            version=node.version if node.domain == domain else None,
            name=names.fresh_node(f"{name_of(node)}/right"),
            doc_string=node.doc_string,
            metadata_props={**node.metadata_props, MARK: "right"},
        )
        node.prepend(first)
        return first
