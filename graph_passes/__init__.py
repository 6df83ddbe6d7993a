"""ONNX surgery for low-rank factors: find the weights of a graph, and split its nodes with factors from outside.

    sites = find_sites(model)                      sites, and the reasons of nodes that are none
    FoldBatchNormPass()(model)                     first: fold statistics into the Convs
    records = split(model, factors)                then: one node becomes two, one record a node

numpy, onnx and onnx_ir only. Nothing here computes a factor.
"""

from graph_passes.collector import paused_collector
from graph_passes.fold_batch_norm import Fold, FoldBatchNormPass, FoldResult
from graph_passes.fold_permutations import FoldPermutationsPass, FoldPermutationsResult
from graph_passes.fold_splits import fold_splits
from graph_passes.fold_units import FoldUnitsPass, FoldUnitsResult
from graph_passes.forms import Form
from graph_passes.mac_counts import count_macs, why_not_counted
from graph_passes.macs.executed_node import ExecutedNode, Macs, NotCounted
from graph_passes.operators import PASSES, find_pass, multiplies_by_weights
from graph_passes.parameters import count_parameters
from graph_passes.records import (
    Dense,
    FactorSource,
    Keep,
    Record,
    Site,
    Skip,
    Split,
    SplitFactors,
    SplitResult,
    Units,
    drawn_factors,
    in_memory,
)
from graph_passes.response import Contraction, RowOrder
from graph_passes.split_all import find_sites, joint_groups, split, split_by_site
from graph_passes.split_pass import SplitPass, Splitter
from graph_passes.window import Window

__all__ = [
    "PASSES",
    "Contraction",
    "Dense",
    "ExecutedNode",
    "FactorSource",
    "Fold",
    "FoldBatchNormPass",
    "FoldPermutationsPass",
    "FoldPermutationsResult",
    "FoldResult",
    "FoldUnitsPass",
    "FoldUnitsResult",
    "Form",
    "Keep",
    "Macs",
    "NotCounted",
    "Record",
    "RowOrder",
    "Site",
    "Skip",
    "Split",
    "SplitFactors",
    "SplitPass",
    "SplitResult",
    "Splitter",
    "Units",
    "Window",
    "count_macs",
    "count_parameters",
    "drawn_factors",
    "find_pass",
    "find_sites",
    "fold_splits",
    "in_memory",
    "joint_groups",
    "multiplies_by_weights",
    "paused_collector",
    "split",
    "split_by_site",
    "why_not_counted",
]
