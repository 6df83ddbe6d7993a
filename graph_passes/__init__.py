"""ONNX surgery for low-rank factors: find the weights of a graph, and split its nodes with factors given from outside.

    sites = find_sites(model)                      what could be split, what not and why
    FoldBatchNormPass()(model)                     first: statistics into the Convs
    records = split(model, factors)                then: one node becomes two, one record a node

numpy, onnx and onnx_ir only. Nothing here computes a factor.
"""

from graph_passes.collector import paused_collector
from graph_passes.fold_batch_norm import Fold, FoldBatchNormPass, FoldResult
from graph_passes.forms import Form
from graph_passes.macs import ExecutedNode, Macs, NotCounted, count_macs, why_not_counted
from graph_passes.parameters import count_parameters
from graph_passes.records import Dense, Factors, FactorSource, Keep, Record, Site, Skip, Split, SplitResult, in_memory
from graph_passes.split_all import find_sites, joint_groups, split, split_by_site
from graph_passes.split_attention import SplitAttentionPass
from graph_passes.split_conv import SplitConvPass, SplitFusedConvPass
from graph_passes.split_conv_transpose import SplitConvTransposePass
from graph_passes.split_fused_matmul import SplitFusedMatMulPass
from graph_passes.split_gemm import SplitFusedGemmPass, SplitGemmPass
from graph_passes.split_matmul import SplitMatMulPass
from graph_passes.split_pass import Splitter
from graph_passes.window import Window

__all__ = [
    "Dense",
    "ExecutedNode",
    "FactorSource",
    "Factors",
    "Fold",
    "FoldBatchNormPass",
    "FoldResult",
    "Form",
    "Keep",
    "Macs",
    "NotCounted",
    "Record",
    "Site",
    "Skip",
    "Split",
    "SplitAttentionPass",
    "SplitConvPass",
    "SplitConvTransposePass",
    "SplitFusedConvPass",
    "SplitFusedGemmPass",
    "SplitFusedMatMulPass",
    "SplitGemmPass",
    "SplitMatMulPass",
    "SplitResult",
    "Splitter",
    "Window",
    "count_macs",
    "count_parameters",
    "find_sites",
    "in_memory",
    "joint_groups",
    "paused_collector",
    "split",
    "split_by_site",
    "why_not_counted",
]
