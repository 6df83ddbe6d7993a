"""The registry of operators: every split pass, and the operators with a weight that no pass splits.

A pass describes its operator (see `graph_passes.split_pass.SplitPass`). Callers look the class up here, by domain and
op type; what they need of operators without a pass stands in tables by family, which are merged with the passes here.
"""

from collections.abc import Mapping
from types import MappingProxyType

from graph_passes import axis_rules, macs
from graph_passes.axis_rules.moves import Rule
from graph_passes.macs.executed_node import Formula, Operator
from graph_passes.split_attention import SplitAttentionPass
from graph_passes.split_conv import SplitConvPass, SplitFusedConvPass
from graph_passes.split_conv_transpose import SplitConvTransposePass
from graph_passes.split_einsum import SplitEinsumPass
from graph_passes.split_fused_matmul import SplitFusedMatMulPass
from graph_passes.split_gemm import SplitFusedGemmPass, SplitGemmPass
from graph_passes.split_matmul import SplitMatMulPass
from graph_passes.split_pass import SplitPass

PASSES: tuple[type[SplitPass], ...] = (
    SplitMatMulPass,
    SplitGemmPass,
    SplitConvPass,
    SplitConvTransposePass,
    SplitFusedMatMulPass,
    SplitFusedGemmPass,
    SplitFusedConvPass,
    SplitAttentionPass,
    SplitEinsumPass,
)

UNSPLIT: Mapping[tuple[str, str], tuple[int, ...]] = MappingProxyType(
    {
        ("", "ConvInteger"): (1,),
        ("", "DeformConv"): (1,),
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
)
"""Operators that are reported and not split -> their inputs that may hold a weight."""

_BY_OPERATOR: Mapping[Operator, type[SplitPass]] = {(each.domain, each.op_type): each for each in PASSES}

FORMULAS: Mapping[Operator, Formula] = MappingProxyType(
    {**macs.FORMULAS, **{operator: each.macs for operator, each in _BY_OPERATOR.items()}}
)
"""Operator -> its multiply-accumulates; operators without products are not in it."""

AXIS_RULES: Mapping[Operator, Rule] = MappingProxyType(
    {**axis_rules.RULES, **{operator: each.axis_rule for operator, each in _BY_OPERATOR.items()}}
)
"""Operator -> how it moves axes; an operator that is not in it is not known to keep samples apart."""

_WEIGHT_PRODUCTS = frozenset(op_type for domain, op_type in (*_BY_OPERATOR, *UNSPLIT) if (domain, op_type) in FORMULAS)


def find_pass(domain: str, op_type: str) -> type[SplitPass] | None:
    """Return the pass of an operator, or None where no pass splits it.

    Examples:
        >>> find_pass("ai.onnx", "Gemm").form, find_pass("", "LSTM")
        ('gemm', None)
    """
    return _BY_OPERATOR.get(operator_of(domain, op_type))


def operator_of(domain: str, op_type: str) -> Operator:
    """Return the key of an operator; ONNX's own domain has two spellings."""
    return ("" if domain == "ai.onnx" else domain), op_type


def multiplies_by_weights(op_type: str) -> bool:
    """Return whether an operator multiplies by a weight, also one that a runtime has fused and named after it.

    Examples:
        >>> [multiplies_by_weights(name) for name in ("Conv", "FusedConv", "LSTM", "Add", "Gather")]
        [True, True, True, False, False]
    """
    return any(name in op_type for name in _WEIGHT_PRODUCTS)
