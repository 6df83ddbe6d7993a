"""Multiply-accumulates (MACs) of one executed node, from its shapes and attributes: the one table of the project.

    operator --> a formula     products.py, einsum.py, convolutions.py, recurrent.py, attention.py
             --> 0             no_products.py, with the reason
             --> NotCounted    no_products.py, and every operator that the table has not

Sums of products count: a bias, a norm, an activation, a pooling, a lookup and a quantizer count 0. Products of two
activations count as those with a weight do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graph_passes.macs import attention, convolutions, einsum, products, recurrent
from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, NotCounted, Operator, Shape
from graph_passes.macs.no_products import NO_PRODUCTS, UNKNOWN

__all__ = [
    "FORMULAS",
    "NO_PRODUCTS",
    "UNKNOWN",
    "ExecutedNode",
    "Formula",
    "Macs",
    "NotCounted",
    "Operator",
    "Shape",
    "count_macs",
    "operator_of",
    "why_not_counted",
]

FORMULAS: Mapping[Operator, Formula] = MappingProxyType(
    products.FORMULAS | einsum.FORMULAS | convolutions.FORMULAS | recurrent.FORMULAS | attention.FORMULAS
)


def operator_of(domain: str, op_type: str) -> Operator:
    """The key of the table; ONNX's own domain has two spellings."""
    return ("" if domain == "ai.onnx" else domain), op_type


def why_not_counted(domain: str, op_type: str) -> str:
    """Why the MACs of an operator cannot be told, or "" where its nodes are counted.

    Examples:
        >>> why_not_counted("", "MatMul"), why_not_counted("com.example", "Mix")
        ('', 'no formula is known for it')
    """
    operator = operator_of(domain, op_type)
    if operator in FORMULAS or operator in NO_PRODUCTS:
        return ""
    return UNKNOWN.get(operator, "no formula is known for it")


def count_macs(node: ExecutedNode) -> Macs | NotCounted:
    """MACs of one execution; 0 for an operator that multiplies no matrices.

    A node whose shapes or attributes are not those that its operator takes is not counted.

    Examples:
        >>> count_macs(ExecutedNode(domain="", op_type="MatMul", inputs=((7, 12), (12, 5)), outputs=((7, 5),))).total
        420
        >>> filters = (128, 64, 3, 3)
        >>> conv = ExecutedNode(
        ...     domain="", op_type="Conv", inputs=((1, 64, 56, 56), filters), outputs=((1, 128, 28, 28),)
        ... )
        >>> count_macs(conv).total == 128 * 28 * 28 * 64 * 9
        True
    """
    if reason := why_not_counted(node.domain, node.op_type):
        return NotCounted(reason)
    formula = FORMULAS.get(operator_of(node.domain, node.op_type))
    if formula is None:
        return Macs()
    try:
        return formula(node)
    except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration) as error:
        return NotCounted(f"its shapes or attributes are not those that the formula takes ({error})")
