"""How each operator moves the axes of its inputs: the rules that `graph_passes.batch_axis` proves a batch with.

The rule of an operator that a pass splits stands with its pass; the others stand here, by family.
"""

from graph_passes.axis_rules import layout, pointwise, products, reductions, sequences
from graph_passes.axis_rules.moves import RULES

RULE_MODULES = (layout, pointwise, products, reductions, sequences)
"""Each of them enters its rules into `RULES` when it is imported."""

__all__ = ["RULES", "RULE_MODULES"]
