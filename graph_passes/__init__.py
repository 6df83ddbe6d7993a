"""ONNX surgery for low-rank factors: find the weights of a graph, and split its nodes with factors given from outside.

    sites = find_sites(model)                      what could be split, what not and why
    FoldBatchNormPass()(model)                     first: statistics into the Convs
    records = split(model, factors)                then: one node becomes two, one record a node

numpy, onnx and onnx_ir only. Nothing here computes a factor.
"""

from graph_passes.fold_batch_norm import Fold, FoldBatchNormPass, FoldResult
from graph_passes.records import Dense, Factors, FactorSource, Keep, Record, Site, Skip, Split, SplitResult, in_memory
from graph_passes.split_all import find_sites, split
from graph_passes.split_conv import SplitConvPass
from graph_passes.split_gemm import SplitGemmPass
from graph_passes.split_matmul import SplitMatMulPass

__all__ = [
    "Dense",
    "FactorSource",
    "Factors",
    "Fold",
    "FoldBatchNormPass",
    "FoldResult",
    "Keep",
    "Record",
    "Site",
    "Skip",
    "Split",
    "SplitConvPass",
    "SplitGemmPass",
    "SplitMatMulPass",
    "SplitResult",
    "find_sites",
    "in_memory",
    "split",
]
