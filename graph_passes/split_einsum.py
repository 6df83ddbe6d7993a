"""Einsum with one constant operand, where the contraction is a matrix product.

    Y = Einsum<"bsd,dhk->bhsk">(X, B),  B (d, h, k), W (out = h * k, in = d)

    X --> Einsum --> Y    becomes    X --> MatMul --> Einsum --> Y
          B                               right^T    left^T, "bsr,rhk->bhsk"

    Y = Einsum<"bshk,hkd->bsd">(X, B),  B (h, k, d), W (out = d, in = h * k)

    X --> Einsum --> Y    becomes    X --> Einsum --> Einsum --> Y
          B                               right^T, "bshk,hkr->bsr"
                                                     left^T, "bsr,rd->bsd"

The columns of W are the indices that data and weight share, in the order of the data. The rows of W are the indices of
the weight alone, in the order of the output. The constant may be the first operand. The first node is a MatMul where
the last axis of the data is the only one that is summed over.

A bias correction goes into the Add behind, or becomes one, along the rows of W in the output.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from graph_passes.axis_rules.moves import Moves, Target
from graph_passes.axis_rules.products import meets
from graph_passes.axis_rules.values import NodeCall
from graph_passes.bias import add_behind
from graph_passes.macs.executed_node import ExecutedNode, Macs
from graph_passes.parts import Parts, resized
from graph_passes.response import Contraction, RowOrder
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight

ELLIPSIS = "..."
_LETTERS = "rabcdefghijklmnopqstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # r first: the rank

_Index: TypeAlias = str | int  # a letter, or an axis under an ellipsis, counted from its right: -1 is the last one


class SplitEinsumPass(SplitPass):
    """Splits an Einsum of two operands that is a matrix product, with any order of axes and either operand constant.

    Refused are other numbers of operands, an index that both operands and the output have, an index that is summed
    over in one operand alone, a diagonal, an ellipsis in the weight or behind letters, and a product without rows or
    columns.
    """

    op_type = "Einsum"
    form = "matmul"
    operands = (1, 0, 2)
    contraction = Contraction.EINSUM

    @staticmethod
    def macs(node: ExecutedNode) -> Macs:
        """Multiply the sizes of all indices of two operands; contract more of them pair by pair from the left.

        That is how onnxruntime contracts them; an index is summed out as soon as neither a later operand nor the
        output has it. One operand counts 0. Axes of size 1 are stretched, so the largest size of an index counts.
        """
        terms, output_term = _terms(node.attributes["equation"])
        shapes = [node.input(position) for position in range(len(terms))]
        operands = [_axes(term, len(shape)) for term, shape in zip(terms, shapes, strict=True)]
        sizes: dict[_Index, int] = {}
        for indices, shape in zip(operands, shapes, strict=True):
            for index, size in zip(indices, shape, strict=True):
                sizes[index] = 0 if size == 0 else max(sizes.get(index, 1), size)
        output = {index for index in sizes if isinstance(index, int) or index in output_term}
        total, known = 0, set(operands[0])
        for position, operand in enumerate(operands[1:], start=1):
            known |= set(operand)
            total += math.prod(sizes[index] for index in known)
            known &= output.union(*operands[position + 1 :])
        return Macs(total)

    @staticmethod
    def axis_rule(call: NodeCall) -> Moves:
        """Move each index of an operand to its place in the output; the others are summed over."""
        terms, output_term = _terms(call.attribute("equation", b""))
        operands = [_axes(term, call.rank(position)) for position, term in enumerate(terms)]
        hidden = max((-index for each in operands for index in each if isinstance(index, int)), default=0)
        output = _axes(output_term, len(output_term.replace(ELLIPSIS, "")) + hidden * (ELLIPSIS in output_term))
        inputs: dict[int, list[Target]] = {}
        for position, indices in enumerate(operands):
            others = [each for each in range(len(operands)) if each != position]
            inputs[position] = [
                output.index(index) if output.count(index) == indices.count(index) == 1 else meets(call, others)
                for index in indices
            ]
        return Moves(inputs=inputs, dims=lambda _: (None,) * len(output))

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Move the rows of W in front of its columns and flatten both."""
        product = _product(node, operand)
        if isinstance(product, NoWeight):
            return product
        if len(product.weight) != len(weight.shape):
            return NoWeight(reason=f"weight of shape {weight.shape} does not fit the term {product.weight!r}")
        sizes = dict(zip(product.weight, weight.shape, strict=True))
        data = product.data_sizes(node.inputs[1 - operand])
        if any(data.get(index, 0 if sizes[index] == 1 else sizes[index]) != sizes[index] for index in product.columns):
            return NoWeight(reason="weight and data have other sizes of an index: one of them is stretched")
        order = [product.weight.index(index) for index in (*product.rows, *product.columns)]
        rows, columns = (math.prod(sizes[index] for index in each) for each in (product.rows, product.columns))
        return weight.transposed(*order).reshaped(1, rows, columns)

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Return the order that brings columns and rows of W last; None where an ellipsis hides which axes move."""
        product = _product(node, operand)
        if isinstance(product, NoWeight):
            return None
        data, output = _tokens(product.data), _tokens(product.output)
        wanted = [*product.kept, *product.columns], [*product.kept, *product.rows]
        if (data, output) == wanted:
            return RowOrder()
        if ELLIPSIS in data:
            return None
        return RowOrder(data=tuple(map(data.index, wanted[0])), output=tuple(map(output.index, wanted[1])))

    @staticmethod
    def shares_right(found: Found) -> bool:
        """Accept a product whose first node is a MatMul."""
        product = _product(found.node, found.operand)
        return isinstance(product, _Product) and product.begins_with_matmul(found.data)

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """Return the sizes of the rows of W in the output, with 1 for other indices between and behind them."""
        product = _product(found.node, found.operand)
        if isinstance(product, NoWeight):
            return product
        sizes = dict(zip(product.weight, found.shape, strict=True))
        output = _tokens(product.output)
        return tuple(sizes.get(index, 1) for index in output[output.index(product.rows[0]) :])

    @staticmethod
    def add_bias(parts: Parts, shape: tuple[int, ...]) -> None:
        """Add it behind: an Einsum has no input for it."""
        add_behind(parts, shape)

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Sum over the columns in front; the node makes the rows of `rank` numbers."""
        node, data, rank = found.node, found.data, parts.factors.rank
        product = _product(node, found.operand)
        if isinstance(product, NoWeight):
            raise ValueError(f"{found.site.node!r} cannot be split: {product.reason}")
        sizes = dict(zip(product.weight, found.shape, strict=True))
        letter = next(each for each in _LETTERS if each not in product.weight + product.data)
        columns, rows, between = "".join(product.columns), "".join(product.rows), "".join(product.kept) + letter
        right = parts.operand("right", (*(sizes[index] for index in columns), rank), turned=True)
        if product.begins_with_matmul(data):
            first = parts.first("MatMul", (data, right), shape=None if data is None else resized(data, -1, rank))
        else:
            known, shape = product.data_dims(data), None
            if known and ELLIPSIS not in product.data:
                shape = ir.Shape([*(known[index] for index in product.kept), rank])
            equation = ir.AttrString("equation", f"{product.data},{columns}{letter}->{between}")
            first = parts.first("Einsum", (data, right), [equation], shape=shape)
        left = parts.operand("left", (rank, *(sizes[index] for index in rows)), turned=True)
        terms = [between, letter + rows] if found.operand == 1 else [letter + rows, between]
        node.attributes.add(ir.AttrString("equation", f"{','.join(terms)}->{product.output}"))
        node.replace_input_with(1 - found.operand, first.outputs[0])
        node.replace_input_with(found.operand, left)
        return first


@dataclass(frozen=True, kw_only=True)
class _Product:
    """An equation that is a matrix product of data and weight.

    Attributes:
        data: Term of the data.
        weight: Term of the weight.
        output: Term of the output.
        kept: Letters of the data that stay, and its ellipsis, in the order of the data.
        columns: Letters that are summed over, in the order of the data.
        rows: Letters of the weight alone, in the order of the output.
    """

    data: str
    weight: str
    output: str
    kept: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]

    def data_dims(self, value: ir.Value | None) -> dict[str, int | ir.SymbolicDim]:
        """Return the sizes of the data by letter; empty where its shape is not known."""
        letters = self.data.replace(ELLIPSIS, "")
        if value is None or value.shape is None or len(value.shape) < len(letters):
            return {}
        return dict(zip(reversed(letters), reversed(value.shape.dims), strict=False))

    def data_sizes(self, value: ir.Value | None) -> dict[str, int]:
        """Return those sizes of the data that are numbers."""
        return {index: size for index, size in self.data_dims(value).items() if isinstance(size, int)}

    def begins_with_matmul(self, value: ir.Value | None) -> bool:
        """Return whether a MatMul sums over the columns: one letter, the last of the data, of known size."""
        is_last = len(self.columns) == 1 and self.data.endswith(self.columns[0])
        return is_last and self.columns[0] in self.data_sizes(value)


def _product(node: ir.Node, operand: int) -> _Product | NoWeight:
    """Read the equation of a node with this operand constant, or say why it is no matrix product."""
    try:
        terms, output = _terms(node.attributes.get_string("equation", ""))
    except ValueError as error:
        return NoWeight(reason=f"an equation that cannot be read: {error}")
    if len(terms) != 2 or len(node.inputs) != 2:
        return NoWeight(reason=f"an Einsum of {len(node.inputs)} operands: only two are split")
    data, weight = terms[1 - operand], terms[operand]
    in_data, in_weight, in_output = (_tokens(term) for term in (data, weight, output))
    if ELLIPSIS in weight or any(each.index(ELLIPSIS) for each in (in_data, in_output) if ELLIPSIS in each):
        return NoWeight(reason="an ellipsis in the weight, or behind other indices")
    if any(len(each) != len(set(each)) for each in (in_data, in_weight, in_output)):
        return NoWeight(reason="an index that repeats in one term")
    if shared := sorted({*in_data} & {*in_weight} & {*in_output}):
        return NoWeight(reason=f"index {shared[0]!r} is a batch index of weight and data")
    if alone := sorted(({*in_data} ^ {*in_weight}) - {*in_output}):
        return NoWeight(reason=f"index {alone[0]!r} is summed over in one operand alone")
    columns = tuple(index for index in in_data if index in in_weight)
    rows = tuple(index for index in in_output if index in in_weight)
    if not (columns and rows):
        return NoWeight(reason="no index is summed over, or the weight has none of its own")
    kept = tuple(index for index in in_data if index not in in_weight)
    return _Product(data=data, weight=weight, output=output, kept=kept, columns=columns, rows=rows)


def _terms(equation: str | bytes) -> tuple[list[str], str]:
    """Return the terms of the operands and of the output, which ONNX derives where it is not written.

    Examples:
        >>> _terms("bs d, dk -> bsk"), _terms("...ij,jk")
        ((['bsd', 'dk'], 'bsk'), (['...ij', 'jk'], '...ik'))
    """
    text = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "")
    left, arrow, output = text.partition("->")
    letters = left.replace(ELLIPSIS, "").replace(",", "") + output.replace(ELLIPSIS, "")
    if not all(letter.isascii() and letter.isalpha() for letter in letters):
        raise ValueError(f"expected letters, commas and ellipses, but got {text!r}")
    if not arrow:
        once = (letter for letter in set(letters) if letters.count(letter) == 1)
        output = ELLIPSIS * (ELLIPSIS in left) + "".join(sorted(once))
    return left.split(","), output


def _tokens(term: str) -> list[str]:
    """Return the letters of a term, with an ellipsis as one of them."""
    before, dots, after = term.partition(ELLIPSIS)
    return [*before, *([dots] if dots else []), *after]


def _axes(term: str, rank: int) -> list[_Index]:
    """Return the index of every axis of an operand."""
    before, dots, after = term.partition(ELLIPSIS)
    count = rank - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise ValueError(f"the term {term!r} does not fit an operand of {rank} axes; expected a letter an axis")
    return [*before, *range(-count, 0), *after]
