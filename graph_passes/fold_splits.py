"""Fold what forms of a split leave in a graph into the weights around: selections of hidden units, permutations."""

import onnx_ir as ir

from graph_passes.fold_permutations import FoldPermutationsPass, Replace, lazily
from graph_passes.hidden_units import FoldUnitsPass


def fold_splits(model: ir.Model, *, replace: Replace = lazily) -> None:
    """Remove hidden units that no split keeps, and the Gathers of pivoted splits, in place, where the graph allows it.

    Args:
        model: A model whose sites are split.
        replace: Stores a permuted weight, as for `FoldPermutationsPass`.
    """
    FoldUnitsPass()(model)
    FoldPermutationsPass(replace=replace)(model)
