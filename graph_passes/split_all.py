"""All forms together: the sites of a model, and splitting them in graph order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from graph_passes.records import FactorSource, Keep, Record, Site, Skip, in_memory
from graph_passes.split_conv import SplitConvPass
from graph_passes.split_gemm import SplitGemmPass
from graph_passes.split_matmul import SplitMatMulPass
from graph_passes.split_pass import run
from graph_passes.survey import Found, survey

FAMILIES = (SplitMatMulPass, SplitGemmPass, SplitConvPass)

UNSPLIT: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", "ConvTranspose"): (1,),
        ("", "DeformConv"): (1,),
        ("", "Einsum"): (0, 1, 2),
        ("", "Gather"): (0,),
        ("", "GRU"): (1, 2),
        ("", "LSTM"): (1, 2),
        ("", "RNN"): (1, 2),
        ("", "ConvInteger"): (1,),
        ("", "MatMulInteger"): (1, 0),
        ("", "QLinearConv"): (3,),
        ("", "QLinearMatMul"): (3, 0),
        ("com.microsoft", "Attention"): (1,),
        ("com.microsoft", "DynamicQuantizeMatMul"): (1,),
        ("com.microsoft", "FusedConv"): (1,),
        ("com.microsoft", "FusedGemm"): (1,),
        ("com.microsoft", "FusedMatMul"): (1, 0),
        ("com.microsoft", "MatMulNBits"): (1,),
        ("com.microsoft", "QGemm"): (3,),
    }
)  # reported, not split: (domain, op_type) -> inputs that may hold a weight


def find_sites(model: ir.Model) -> list[Site | Skip]:
    """Every weight-bearing node in graph order: what could be split, and what cannot and why. Reads no weight."""
    return [entry.site if isinstance(entry, Found) else entry for entry in survey(model, FAMILIES, UNSPLIT)]


def split(model: ir.Model, factors: FactorSource, *, keep: Keep = in_memory) -> list[Record]:
    """Split in place every node for which the source gives factors.

    The source is called once a weight and orientation, in graph order; nodes that share a weight share its factors.

    Args:
        model: Changed in place. Its opset, its inputs and its outputs stay.
        factors: Gives `Factors` (in the stored dtype) or `Dense` for a site. The rank is its business.
        keep: Stores each factor; by default in memory. One that writes to disk bounds the memory by one weight.

    Returns:
        One record for every weight-bearing node, in graph order; those inside model functions last.

    Raises:
        ValueError: When factors do not fit the site, have another dtype, or hold NaN; nodes before it are split.
    """
    return list(run(model, FAMILIES, factors, UNSPLIT, keep).records)
