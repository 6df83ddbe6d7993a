"""Formulas of multiply-accumulates (MACs) by family, for the operators that no pass splits.

The formula of an operator with a pass stands with its pass; `graph_passes.mac_counts` uses both.
"""

from collections.abc import Mapping

from graph_passes.macs import attention, convolutions, products, recurrent
from graph_passes.macs.executed_node import Formula, Operator

FORMULAS: Mapping[Operator, Formula] = (
    products.FORMULAS | convolutions.FORMULAS | recurrent.FORMULAS | attention.FORMULAS
)
