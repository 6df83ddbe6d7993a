"""Fold what forms of a split leave in a graph into the weights around: selections, bases of heads, permutations."""

import onnx_ir as ir

from graph_passes.constants import lazily
from graph_passes.fold_permutations import FoldPermutationsPass, Replace
from graph_passes.fold_units import FoldUnitsPass


def fold_splits(model: ir.Model, *, replace: Replace = lazily) -> None:
    """Remove what no split keeps of units and heads, and the Gathers of pivoted splits, in place, where it can be done.

    Args:
        model: A model whose sites are split.
        replace: Stores a permuted weight, as for `FoldPermutationsPass`.
    """
    FoldUnitsPass()(model)
    FoldPermutationsPass(replace=replace)(model)
