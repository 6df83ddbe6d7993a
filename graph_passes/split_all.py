"""All forms together: the sites of a model, and splitting them in graph order."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from graph_passes.collector import paused_collector
from graph_passes.joint import joint_members
from graph_passes.records import FactorSource, Keep, Record, Site, Skip, in_memory
from graph_passes.split_attention import SplitAttentionPass
from graph_passes.split_conv import SplitConvPass, SplitFusedConvPass
from graph_passes.split_conv_transpose import SplitConvTransposePass
from graph_passes.split_fused_matmul import SplitFusedMatMulPass
from graph_passes.split_gemm import SplitFusedGemmPass, SplitGemmPass
from graph_passes.split_matmul import SplitMatMulPass
from graph_passes.split_pass import Splitter, run
from graph_passes.survey import Found, survey

FAMILIES = (
    SplitMatMulPass,
    SplitGemmPass,
    SplitConvPass,
    SplitConvTransposePass,
    SplitFusedMatMulPass,
    SplitFusedGemmPass,
    SplitFusedConvPass,
    SplitAttentionPass,
)

UNSPLIT: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", "ConvInteger"): (1,),
        ("", "DeformConv"): (1,),
        ("", "Einsum"): (0, 1, 2),
        ("", "Gather"): (0,),
        ("", "GRU"): (1, 2),
        ("", "LSTM"): (1, 2),
        ("", "MatMulInteger"): (1, 0),
        ("", "QLinearConv"): (3,),
        ("", "QLinearMatMul"): (3, 0),
        ("", "RNN"): (1, 2),
        ("com.microsoft", "DecoderAttention"): (2, 3),
        ("com.microsoft", "DecoderMaskedSelfAttention"): (1,),
        ("com.microsoft", "DynamicQuantizeLSTM"): (1, 2),
        ("com.microsoft", "DynamicQuantizeMatMul"): (1,),
        ("com.microsoft", "FusedMatMulActivation"): (1, 0),
        ("com.microsoft", "GatherBlockQuantized"): (0,),
        ("com.microsoft", "GemmFloat8"): (1, 0),
        ("com.microsoft", "LongformerAttention"): (1,),
        ("com.microsoft", "MatMulBnb4"): (1,),
        ("com.microsoft", "MatMulInteger16"): (1, 0),
        ("com.microsoft", "MatMulIntegerToFloat"): (1, 0),
        ("com.microsoft", "MatMulNBits"): (1,),
        ("com.microsoft", "MoE"): (2, 4),
        ("com.microsoft", "NhwcConv"): (1,),
        ("com.microsoft", "NhwcFusedConv"): (1,),
        ("com.microsoft", "QAttention"): (1,),
        ("com.microsoft", "QGemm"): (3,),
        ("com.microsoft", "QLinearConv"): (3,),
        ("com.microsoft", "QMoE"): (2,),
        ("com.microsoft", "SparseToDenseMatMul"): (1,),
        ("com.microsoft", "TransposeMatMul"): (1, 0),
    }
)  # reported, not split: (domain, op_type) -> inputs that may hold a weight


def find_sites(model: ir.Model, *, overridable: bool = False) -> list[Site | Skip]:
    """Every weight-bearing node in graph order: what could be split, and what cannot and why. Reads no weight.

    Args:
        model: The model; not changed.
        overridable: Take weights that are graph inputs too for the constants they usually are.
    """
    entries = survey(model, FAMILIES, UNSPLIT, overridable=overridable)
    return [entry.site if isinstance(entry, Found) else entry for entry in entries]


def joint_groups(model: ir.Model, *, overridable: bool = False) -> list[tuple[Site, ...]]:
    """Sites that multiply the same data (q, k, v; gate and up): `split(joint=True)` lets them share one right factor.

    Args:
        model: The model; not changed, no weight is read.
        overridable: As for `find_sites`.
    """
    groups = joint_members(survey(model, FAMILIES, UNSPLIT, overridable=overridable))
    return [tuple(member.site for member in members) for members in groups]


def split(
    model: ir.Model,
    factors: FactorSource,
    *,
    keep: Keep = in_memory,
    overridable: bool = False,
    joint: bool = False,
) -> list[Record]:
    """Split in place every node for which the source gives factors.

    The source is called once a weight and orientation, in graph order; nodes that share a weight share its factors.

    Args:
        model: Changed in place. Its opset, its inputs (but see `overridable`) and its outputs stay.
        factors: Gives `Factors` (in the stored dtype) or `Dense` for a site. The rank is its business.
        keep: Stores each factor; by default in memory. One that writes to disk bounds the memory by one weight.
        overridable: Split weights that are graph inputs too, and drop those inputs. (Before IR version 4 every
            initializer is an input and means nothing by it: there this is always so, as in onnxruntime.)
        joint: Ask the source first for the joint site of each group of `joint_groups`. `Factors` of it split the whole
            group with one shared right factor; `Dense` leaves the nodes to be asked for one by one.

    Returns:
        One record for every weight-bearing node, in graph order; those inside model functions last.

    Raises:
        ValueError: When factors do not fit the site, have another dtype, or hold NaN; nodes before it are split.
    """
    with paused_collector():
        return list(run(model, FAMILIES, factors, UNSPLIT, keep, overridable=overridable, joint=joint).records)


def split_by_site(
    model: ir.Model, *, keep: Keep = in_memory, overridable: bool = False, joint: bool = False
) -> Splitter:
    """As `split`, for a caller that goes through the sites itself: see `Splitter`."""
    return Splitter(model, FAMILIES, UNSPLIT, keep, overridable=overridable, joint=joint)
