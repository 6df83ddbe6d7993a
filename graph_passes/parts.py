"""What a rewrite builds with: the factors as operands, and the first of the two nodes.

Nodes that share a weight share its factor constants; nodes split jointly share the first node too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graph_passes.constants import add_constant
from graph_passes.names import Names, name_of, stem
from graph_passes.records import Array, Factors, Keep
from graph_passes.survey import MARK, Found, WeightKey


class Store:
    """The factor constants made so far, so that nodes that share a weight share its factors."""

    def __init__(self, names: Names, keep: Keep, *, always_nodes: bool) -> None:
        self.names = names
        self._keep = keep
        self._always_nodes = always_nodes
        self._values: dict[WeightKey, dict[tuple[str, bool, tuple[int, ...]], ir.Value]] = {}

    def value(self, parts: Parts, side: Literal["left", "right"], shape: tuple[int, ...], turned: bool) -> ir.Value:
        """The constant of one factor, made when first asked for."""
        weight, as_node = parts.found.weight, self._always_nodes or parts.found.in_function
        values = self._values.setdefault(parts.found.key, {})
        if (side, turned, shape) not in values:
            factor: Array = getattr(parts.factors, side)
            array = np.ascontiguousarray((factor.swapaxes(-1, -2) if turned else factor).reshape(shape))
            name = self.names.fresh_value(f"{stem(weight.name)}.{side}")
            before = weight.root.producer() or next(iter(weight.root.graph or ()))
            value = add_constant(array, name, before, as_node=as_node, keep=self._keep)
            values[side, turned, shape] = value
        return values[side, turned, shape]

    def forget(self, weight: WeightKey) -> None:
        """No node to come asks for the factors of this weight."""
        self._values.pop(weight, None)


def resized(value: ir.Value, axis: int, size: int) -> ir.Shape | None:
    """The shape of a value with another size along one axis; None where the shape is unknown."""
    if value.shape is None:
        return None
    dims = list(value.shape)
    dims[axis] = size
    return ir.Shape(dims)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a rewrite builds with: the factors as operands, and the first node.

    Attributes:
        found: The node to split.
        factors: The factors of its weight.
        store: The factor constants made so far.
        joined: The first node of a joint split, where it is there already.
    """

    found: Found
    factors: Factors
    store: Store
    joined: ir.Node | None = None

    def operand(self, side: Literal["left", "right"], shape: Sequence[int], *, turned: bool = False) -> ir.Value:
        """A factor as a node input: stored in `shape`, with its last two axes swapped first if `turned`."""
        if side == "right" and self.joined is not None and (right := self.joined.inputs[1]) is not None:
            return right
        weight, node = self.found.weight, self.found.node
        value = self.store.value(self, side, tuple(shape), turned)
        if weight.dtype == weight.stored_dtype:
            return value
        names = self.store.names
        cast_node = ir.node("Cast", [value], {"to": weight.dtype}, name=names.fresh_node(f"{name_of(node)}/cast"))
        cast_node.outputs[0].name = names.fresh_value(f"{value.name}/cast")
        if not self.found.in_function:  # functions carry types only since IR version 10
            cast_node.outputs[0].type, cast_node.outputs[0].shape = ir.TensorType(weight.dtype), ir.Shape(shape)
        node.prepend(cast_node)
        return cast_node.outputs[0]

    def first(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        shape: ir.Shape | None,
        domain: str = "",
    ) -> ir.Node:
        """Insert the first node, in front of the found one, unless another node's is shared.

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
