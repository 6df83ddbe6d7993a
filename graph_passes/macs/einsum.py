"""MACs of Einsum.

one operand         0: sums, diagonals and transpositions multiply nothing
two operands        the product of all index sizes
three and more      pair by pair from the left, as onnxruntime contracts them; an index is summed out as soon as
                    neither a later operand nor the output has it

A repeated letter is one index. An ellipsis stands for the batch axes, aligned from the right; an axis of size 1 is
stretched, so an index is as large as the largest axis that bears it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator, Shape

_Index = str | int  # a letter, or a batch axis counted from the right: -1 is the last one


def einsum(node: ExecutedNode) -> Macs:
    """See the table above; an output that is not written out has the letters that stand once, as ONNX says."""
    equation = node.attributes["equation"]
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    shapes = [node.input(position) for position in range(len(terms))]
    operands = [_indices(term, shape) for term, shape in zip(terms, shapes, strict=True)]
    sizes: dict[_Index, int] = {}
    for indices, shape in zip(operands, shapes, strict=True):
        for index, size in zip(indices, shape, strict=True):
            sizes[index] = 0 if size == 0 else max(sizes.get(index, 1), size)
    batch = {index for index in sizes if isinstance(index, int)}
    letters = set(right) - {"."} if arrow else {letter for letter in left if left.count(letter) == 1} - {",", "."}
    output: set[_Index] = {*letters, *batch}
    return Macs(_pair_by_pair(operands, output, sizes))


def _pair_by_pair(operands: Sequence[Sequence[_Index]], output: set[_Index], sizes: dict[_Index, int]) -> int:
    total, known = 0, set(operands[0])
    for position, operand in enumerate(operands[1:], start=1):
        known |= set(operand)
        total += math.prod(sizes[index] for index in known)
        later = {index for others in operands[position + 1 :] for index in others}
        known &= later | output
    return total


def _indices(term: str, shape: Shape) -> list[_Index]:
    """The index of every axis of one operand."""
    before, dots, after = term.partition("...")
    count = len(shape) - len(before) - len(after)
    if count < 0 or (count and not dots):
        raise ValueError(f"the term {term!r} does not fit an operand of shape {shape}; expected a letter an axis")
    return [*before, *range(-count, 0), *after]


FORMULAS: dict[Operator, Formula] = {("", "Einsum"): einsum}
