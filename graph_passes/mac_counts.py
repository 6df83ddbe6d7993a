"""Multiply-accumulates (MACs) of one executed node, from its shapes and attributes.

    operator --> a formula     of its pass, or of its family in `graph_passes.macs`
             --> 0             no_products.py, with the reason
             --> NotCounted    no_products.py, and every operator that has no entry

Sums of products count: a bias, a norm, an activation, a pooling, a lookup and a quantizer count 0. Products of two
activations count as those with a weight do.
"""

from graph_passes.macs.executed_node import ExecutedNode, Macs, NotCounted
from graph_passes.macs.no_products import NO_PRODUCTS, UNKNOWN
from graph_passes.operators import FORMULAS, operator_of


def why_not_counted(domain: str, op_type: str) -> str:
    """Return why the MACs of an operator are not known, or "" where its nodes are counted.

    Examples:
        >>> why_not_counted("", "MatMul"), why_not_counted("com.example", "Mix")
        ('', 'no formula is known for it')
    """
    operator = operator_of(domain, op_type)
    if operator in FORMULAS or operator in NO_PRODUCTS:
        return ""
    return UNKNOWN.get(operator, "no formula is known for it")


def count_macs(node: ExecutedNode) -> Macs | NotCounted:
    """Return the MACs of one execution; 0 for an operator that multiplies no matrices.

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
