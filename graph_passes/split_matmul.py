"""MatMul with one constant operand.

    X @ B,  B (*batch, in, out), W = B^T       A @ X,  A (*batch, out, in), W = A

    X --> MatMul --> Y                         X --> MatMul --> Y
            B                                          A
    becomes                                    becomes
    X --> MatMul --> MatMul --> Y              X --> MatMul --> MatMul --> Y
         right^T    left^T                            right      left
   (*batch, in, rank) (*batch, rank, out)    (*batch, rank, in) (*batch, out, rank)

One factorization a batch entry: W is `(groups, out, in)` with groups = prod(batch). X may have any number of axes, and
its own batch axes broadcast against those of the weight.

A bias correction goes into the Add behind, or becomes one: (*batch, 1, out), or (*batch, out, 1) on the left.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from graph_passes.axis_rules.products import product
from graph_passes.bias import add_behind
from graph_passes.macs.products import matmul
from graph_passes.parts import Parts, resized
from graph_passes.response import Contraction, RowOrder
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight


class SplitMatMulPass(SplitPass):
    """Splits `MatMul(X, B)` and `MatMul(A, X)` with a constant B or A, batched or not.

    1. A constant vector is refused.
    2. A batched constant is refused where the data is a vector, or of unknown rank: its intermediate product would be
       taken for a matrix.
    3. MatMul between two computed values (attention scores) bears no weight and leaves no record.
    """

    op_type = "MatMul"
    form = "matmul"
    operands = (1, 0)
    contraction: ClassVar[Contraction | None] = Contraction.MATMUL
    macs = staticmethod(matmul)
    axis_rule = staticmethod(partial(product, right=1))

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Transpose (*batch, in, out) on the right; leave (*batch, out, in) on the left."""
        axes = len(weight.shape)
        if axes < 2:
            return NoWeight(reason=f"weight has {axes} axes: only matrices are split")
        if axes > 2 and (reason := _needs_matrix(node, operand, axes)):
            return NoWeight(reason=reason)
        if operand == 1:
            weight = weight.transposed(*range(axes - 2), axes - 1, axes - 2)
        return weight.reshaped(math.prod(weight.shape[:-2]), *weight.shape[-2:])

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Accept one matrix, on the right."""
        return RowOrder() if operand == 1 and weight.shape[0] == 1 else None

    @staticmethod
    def can_pivot(node: ir.Node, operand: int, weight: Weight) -> bool:
        """Accept one matrix, on the right."""
        return operand == 1 and weight.shape[0] == 1

    @staticmethod
    def shares_right(found: Found) -> bool:
        """Accept one matrix, on the right."""
        return found.operand == 1 and len(found.shape) == 2

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """Return the shape along the weight's side of the output."""
        return product_bias_shape(found, found.shape[:-2])

    @staticmethod
    def add_bias(parts: Parts, shape: tuple[int, ...]) -> None:
        """Add it behind: a product has no input for it."""
        add_behind(parts, shape)

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Make two MatMuls on the weight's side of the data."""
        return rewrite_product(found, parts, found.shape[:-2])


def rewrite_product(
    found: Found,
    parts: Parts,
    batch: tuple[int, ...],
    *,
    op_type: str = "MatMul",
    attributes: Sequence[ir.Attr] = (),
    domain: str = "",
) -> ir.Node:
    """Put the first product in front of the node and make the node the second one.

    Args:
        found: The node.
        parts: Its factors.
        batch: The batch axes of the weight.
        op_type: Operator of the first product.
        attributes: Its attributes.
        domain: Its domain.
    """
    node, site, rank, output = found.node, found.site, parts.factors.rank, found.node.outputs[0]
    if found.operand == 1:
        right = parts.operand("right", (*batch, site.in_features, rank), turned=True)
        left = parts.operand("left", (*batch, rank, site.out_features), turned=True)
        inputs, axis = [found.data, right], -1
    else:
        right = parts.operand("right", (*batch, rank, site.in_features))
        left = parts.operand("left", (*batch, site.out_features, rank))
        is_vector = output.shape is not None and len(output.shape) == 1
        inputs, axis = [right, found.data], -1 if is_vector else -2
    first = parts.first(op_type, inputs, attributes, shape=resized(output, axis, rank), domain=domain)
    node.replace_input_with(1 - found.operand, first.outputs[0])
    node.replace_input_with(found.operand, left)
    return first


def product_bias_shape(found: Found, batch: tuple[int, ...]) -> tuple[int, ...] | NoWeight:
    """Return the shape in which a bias is added to a product, or why that is not known.

    Args:
        found: The node, not yet rewritten.
        batch: The batch axes of the weight.
    """
    out_features = found.site.out_features
    if found.operand == 1:
        return (*batch, 1, out_features) if found.site.groups > 1 else (out_features,)
    if len(found.shape) > 2:
        return (*batch, out_features, 1)
    shapes = [value.shape for value in (found.data, found.node.outputs[0]) if value is not None]
    axes = [len(shape) for shape in shapes if shape is not None]
    if not axes:
        return NoWeight(reason="a bias of a weight on the left needs the data's shape: infer shapes first")
    return (out_features,) if 1 in axes else (out_features, 1)


def _needs_matrix(node: ir.Node, operand: int, axes: int) -> str:
    """Why the data of a batched product may be no matrix, or ""."""
    data, output = node.inputs[1 - operand], node.outputs[0]
    if data is not None and data.shape is not None:
        is_vector = len(data.shape) < 2
    elif output.shape is not None:
        is_vector = len(output.shape) < axes
    else:
        return "weight is batched and the data's shape is unknown: infer shapes first"
    return "weight is batched and the data is a vector: only matrices are multiplied in two steps" if is_vector else ""
