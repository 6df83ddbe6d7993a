"""The table of multiply-accumulates: by hand, operator by operator, and complete for every operator that exists."""

import onnx
import pytest

from graph_passes import ExecutedNode, Macs, NotCounted, count_macs, operators, why_not_counted
from graph_passes.macs import no_products

MS = "com.microsoft"
TABLE = (operators.FORMULAS, no_products.NO_PRODUCTS, no_products.UNKNOWN)


def count(op, inputs, outputs, domain="", **attributes):
    node = ExecutedNode(domain=domain, op_type=op, inputs=tuple(inputs), outputs=tuple(outputs), attributes=attributes)
    return count_macs(node)


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("Conv", [(2, 6, 8, 8), (10, 6, 3, 3), (10,)], [(2, 10, 4, 4)], 2 * 10 * 16 * 6 * 9),
        ("Conv", [(1, 6, 8, 8), (12, 2, 3, 3)], [(1, 12, 8, 8)], 12 * 64 * 2 * 9),  # three groups
        ("Conv", [(1, 6, 8, 8), (6, 1, 3, 3)], [(1, 6, 8, 8)], 6 * 64 * 9),  # depthwise
        ("Conv", [(1, 4, 20), (8, 4, 5)], [(1, 8, 16)], 8 * 16 * 4 * 5),
        ("ConvInteger", [(1, 4, 20), (8, 4, 5), (), ()], [(1, 8, 16)], 8 * 16 * 4 * 5),
        ("DeformConv", [(1, 4, 6, 6), (8, 4, 3, 3), (1, 18, 4, 4)], [(1, 8, 4, 4)], 8 * 16 * 4 * 9),
        ("QLinearConv", [(1, 4, 20), (), (), (8, 4, 5), (), (), (), ()], [(1, 8, 16)], 8 * 16 * 4 * 5),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], [(1, 3, 10, 10)], 4 * 25 * 3 * 4),
        ("MatMul", [(7, 12), (12, 5)], [(7, 5)], 7 * 5 * 12),
        ("MatMul", [(2, 3, 7, 12), (2, 3, 12, 5)], [(2, 3, 7, 5)], 6 * 7 * 5 * 12),
        ("MatMul", [(12,), (12, 5)], [(5,)], 5 * 12),
        ("MatMul", [(7, 12), (12,)], [(7,)], 7 * 12),
        ("MatMul", [(12,), (12,)], [()], 12),
        ("MatMul", [(0, 12), (12, 5)], [(0, 5)], 0),
        ("MatMulInteger", [(7, 12), (12, 5), (), ()], [(7, 5)], 7 * 5 * 12),
        ("QLinearMatMul", [(7, 12), (), (), (12, 5), (), (), (), ()], [(7, 5)], 7 * 5 * 12),
        ("Gemm", [(7, 12), (5, 12), (5,)], [(7, 5)], 7 * 5 * 12),
        ("Gemm", [(12, 7), (12, 5)], [(7, 5)], 7 * 5 * 12),  # transA
        ("LSTM", [(9, 2, 5), (1, 24, 5), (1, 24, 6)], [None, (1, 2, 6)], 9 * 2 * 24 * (5 + 6)),
        ("LSTM", [(9, 2, 5), (2, 24, 5), (2, 24, 6), None, (2,)], [(9, 2, 2, 6)], 2 * 9 * 2 * 24 * (5 + 6)),
        ("GRU", [(9, 2, 5), (2, 18, 5), (2, 18, 6)], [(9, 2, 2, 6)], 2 * 9 * 2 * 18 * (5 + 6)),
        ("RNN", [(2, 9, 5), (1, 6, 5), (1, 6, 6)], [(2, 9, 1, 6)], 9 * 2 * 6 * (5 + 6)),  # layout=1
        ("Relu", [(7, 12)], [(7, 12)], 0),
        ("Add", [(7, 12), (12,)], [(7, 12)], 0),
        ("Gather", [(100, 12), (7,)], [(7, 12)], 0),
        ("LayerNormalization", [(7, 12), (12,), (12,)], [(7, 12)], 0),
        ("MaxPool", [(1, 6, 8, 8)], [(1, 6, 4, 4)], 0),
        ("DequantizeLinear", [(12, 5), ()], [(12, 5)], 0),
    ],
)
def test_operators_of_onnx_by_hand(op, inputs, outputs, expected):
    assert count(op, inputs, outputs) == Macs(product=expected)


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes", "expected"),
    [
        ("FusedMatMul", [(7, 12), (12, 5)], [(7, 5)], {}, 7 * 5 * 12),
        ("FusedMatMul", [(12, 7), (12, 5)], [(7, 5)], {"transA": 1}, 7 * 5 * 12),
        ("FusedMatMul", [(12, 12), (12, 5)], [(12, 5)], {"transA": 1}, 12 * 5 * 12),
        ("FusedMatMul", [(7, 3, 12), (3, 12, 5)], [(3, 7, 5)], {"transBatchA": 1}, 3 * 7 * 5 * 12),
        ("FusedMatMul", [(12, 3, 7), (3, 12, 5)], [(3, 7, 5)], {"transBatchA": 1, "transA": 1}, 3 * 7 * 5 * 12),
        ("TransposeMatMul", [(3, 12, 7), (3, 5, 12)], [(3, 7, 5)], {"transA": 1, "transB": 1}, 3 * 7 * 5 * 12),
        ("FusedMatMulActivation", [(12, 7), (12, 5)], [(7, 5)], {"transA": 1}, 7 * 5 * 12),
        ("FusedGemm", [(12, 7), (12, 5), (5,)], [(7, 5)], {"transA": 1}, 7 * 5 * 12),
        ("GemmFloat8", [(7, 12), (5, 12)], [(7, 5)], {"transB": 1}, 7 * 5 * 12),
        ("QGemm", [(7, 12), (), (), (5, 12), (), ()], [(7, 5)], {"transB": 1}, 7 * 5 * 12),
        ("FusedConv", [(2, 6, 8, 8), (10, 6, 3, 3), (10,), (2, 10, 4, 4)], [(2, 10, 4, 4)], {}, 20 * 16 * 54),
        ("NhwcFusedConv", [(2, 8, 8, 6), (10, 6, 3, 3)], [(2, 4, 4, 10)], {}, 20 * 16 * 54),
        ("QLinearConv", [(2, 8, 8, 6), (), (), (10, 6, 3, 3)], [(2, 4, 4, 10)], {"channels_last": 1}, 20 * 16 * 54),
        ("MatMulIntegerToFloat", [(7, 12), (12, 5), (), ()], [(7, 5)], {}, 7 * 5 * 12),
        ("DynamicQuantizeMatMul", [(7, 12), (12, 5), ()], [(7, 5)], {}, 7 * 5 * 12),
        ("MatMulNBits", [(3, 7, 64), (5, 2, 16), (10,)], [(3, 7, 5)], {"K": 64, "N": 5}, 21 * 5 * 64),
        ("MatMulBnb4", [(7, 64), (160,), (5,)], [(7, 5)], {"K": 64, "N": 5}, 7 * 5 * 64),
        ("MatMulNBitsMlp", [(7, 64)], [(7, 5)], {"K": 64, "N": 5}, 2 * 7 * 5 * 64),
        ("MatMulNBitsQkv", [(7, 64)], [(7, 8)], {"K": 64, "Nq": 8, "Nkv": 4}, 7 * 64 * 16),
        ("DynamicQuantizeLSTM", [(9, 2, 5), (1, 5, 24), (1, 6, 24)], [(9, 1, 2, 6)], {}, 9 * 2 * 24 * 11),
        ("MoE", [(7, 8), (7, 4), (4, 16, 8), None, (4, 8, 16)], [(7, 8)], {"k": 2}, 7 * 2 * (16 * 8 + 8 * 16)),
        ("GatherBlockQuantized", [(100, 12), (7,), (100, 1)], [(7, 12)], {}, 0),
        ("SkipLayerNormalization", [(7, 12), (7, 12), (12,)], [(7, 12)], {}, 0),
    ],
)
def test_operators_of_onnxruntime_by_hand(op, inputs, outputs, attributes, expected):
    assert count(op, inputs, outputs, MS, **attributes) == Macs(product=expected)


PROJECTION, SCORES = 16 * 64 * 192, 16 * 16 * 64


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes", "expected"),
    [
        ("Attention", [(1, 16, 64), (64, 192), (192,)], [(1, 16, 64)], {}, (PROJECTION, 2 * SCORES)),
        # five past tokens; the mask between them is absent
        (
            "Attention",
            [(1, 16, 64), (64, 192), (192,), None, (2, 1, 4, 5, 16)],
            [(1, 16, 64), (2, 1, 4, 21, 16)],
            {},
            (PROJECTION, 2 * 16 * 21 * 64),
        ),
        # a cache of 32 that past and present share
        (
            "Attention",
            [(1, 16, 64), (64, 192), (192,), None, (2, 1, 4, 32, 16)],
            [(1, 16, 64)],
            {"past_present_share_buffer": 1},
            (PROJECTION, 2 * 16 * 32 * 64),
        ),
        # values of 32, queries and keys of 64
        (
            "Attention",
            [(1, 16, 64), (64, 160), (160,)],
            [(1, 16, 32)],
            {"qkv_hidden_sizes": [64, 64, 32]},
            (16 * 64 * 160, SCORES + SCORES // 2),
        ),
        ("QAttention", [(1, 16, 64), (64, 192), (192,), (), ()], [(1, 16, 64)], {}, (PROJECTION, 2 * SCORES)),
        (
            "PackedAttention",
            [(20, 64), (64, 192), (192,), (2, 16), (3,)],
            [(20, 64)],
            {},
            (20 * 64 * 192, 2 * 20 * 16 * 64),
        ),
        ("MultiHeadAttention", [(1, 16, 64), (1, 16, 64), (1, 16, 64)], [(1, 16, 64)], {}, (0, 2 * SCORES)),
        ("MultiHeadAttention", [(1, 16, 4, 3, 16)], [(1, 16, 64)], {}, (0, 2 * SCORES)),
        ("MultiHeadAttention", [(1, 8, 64), (1, 16, 4, 2, 16)], [(1, 8, 64)], {}, (0, SCORES)),
        ("MultiHeadAttention", [(1, 8, 64), (1, 4, 16, 16), (1, 4, 16, 16)], [(1, 8, 64)], {}, (0, SCORES)),
        (
            "MultiHeadAttention",
            [(1, 1, 64), (1, 1, 64), (1, 1, 64), None, None, None, (1, 4, 15, 16), (1, 4, 15, 16)],
            [(1, 1, 64)],
            {},
            (0, 2 * 16 * 64),
        ),
        (
            "GroupQueryAttention",
            [(1, 3, 64), None, None, (1, 2, 5, 8), (1, 2, 5, 8), (1,), (1,)],
            [(1, 3, 32), (1, 2, 8, 8), (1, 2, 8, 8)],
            {"num_heads": 4, "kv_num_heads": 2},
            (0, 2 * 3 * 8 * 32),
        ),
        (
            "GroupQueryAttention",
            [(1, 3, 32), (1, 3, 16), (1, 3, 16), None, None, (1,), (1,)],
            [(1, 3, 32)],
            {"num_heads": 4, "kv_num_heads": 2},
            (0, 2 * 3 * 3 * 32),
        ),
    ],
)
def test_attention_of_onnxruntime_by_hand(op, inputs, outputs, attributes, expected):
    assert count(op, inputs, outputs, MS, **{"num_heads": 4, **attributes}) == expected


@pytest.mark.parametrize(
    ("inputs", "output", "expected"),
    [
        ([(2, 3, 10, 8), (2, 3, 11, 8), (2, 3, 11, 4)], (2, 3, 10, 4), 2 * 3 * 10 * 11 * (8 + 4)),
        ([(2, 10, 24), (2, 11, 24), (2, 11, 12)], (2, 10, 12), 2 * 10 * 11 * (24 + 12)),
        # six heads of queries, two of keys and values
        ([(2, 6, 10, 8), (2, 2, 11, 8), (2, 2, 11, 4)], (2, 6, 10, 4), 2 * 6 * 10 * 11 * (8 + 4)),
        ([(2, 10, 48), (2, 11, 16), (2, 11, 8)], (2, 10, 24), 2 * 6 * 10 * 11 * (8 + 4)),
        # a past of 7 behind an absent mask
        (
            [(2, 6, 10, 8), (2, 2, 11, 8), (2, 2, 11, 4), None, (2, 2, 7, 8), (2, 2, 7, 4)],
            (2, 6, 10, 4),
            2 * 6 * 10 * 18 * (8 + 4),
        ),
    ],
)
def test_attention_of_onnx_by_hand(inputs, output, expected):
    assert count("Attention", inputs, [output]) == Macs(attention=expected)


@pytest.mark.parametrize(
    ("equation", "shapes", "output", "expected"),
    [
        ("ij,jk->ik", [(7, 12), (12, 5)], (7, 5), 7 * 12 * 5),
        ("ij,jk", [(7, 12), (12, 5)], (7, 5), 7 * 12 * 5),
        (b" b h q d , b h k d -> b h q k", [(2, 3, 4, 5), (2, 3, 6, 5)], (2, 3, 4, 6), 2 * 3 * 4 * 5 * 6),
        ("...ij,jk->...ik", [(2, 3, 7, 12), (12, 5)], (2, 3, 7, 5), 2 * 3 * 7 * 12 * 5),
        ("...ij,...jk->...ik", [(2, 1, 7, 12), (3, 12, 5)], (2, 3, 7, 5), 2 * 3 * 7 * 12 * 5),
        ("ii,ij->ij", [(7, 7), (7, 5)], (7, 5), 7 * 5),  # the diagonal
        ("i,i->", [(7,), (7,)], (), 7),
        ("ij->ji", [(7, 12)], (12, 7), 0),
        ("ij->i", [(7, 12)], (7,), 0),
        ("ij,jk,kl->il", [(7, 12), (12, 5), (5, 3)], (7, 3), 7 * 12 * 5 + 7 * 5 * 3),  # from the left
        ("ij,jk,kl", [(7, 12), (12, 5), (5, 3)], (7, 3), 7 * 12 * 5 + 7 * 5 * 3),
    ],
)
def test_einsum_by_hand(equation, shapes, output, expected):
    assert count("Einsum", shapes, [output], equation=equation) == Macs(product=expected)


@pytest.mark.parametrize(
    ("op", "domain", "inputs"),
    [
        ("Mix", "com.example", [(7, 12), (12, 5)]),  # an operator of somebody's own
        ("MatMul", "com.example", [(7, 12), (12, 5)]),  # which no name makes known
        ("Einsum", "", [(7, 12), (12, 5)]),  # without its equation
        ("Conv", "", [(7, 12, 3)]),  # without its weight
        ("SparseAttention", MS, [(1, 16, 128)]),
    ],
)
def test_what_cannot_be_told_is_no_zero(op, domain, inputs):
    counted = count(op, inputs, [(7, 5)], domain)
    assert isinstance(counted, NotCounted)
    assert counted.reason


def every_operator():
    """(domain, op type) of all versions of ONNX's operators, and of onnxruntime's own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schemas = [*onnx.defs.get_all_schemas_with_history(), *state.get_all_operator_schema()]
    return {(schema.domain, schema.name) for schema in schemas}


def missing(operators, *tables):
    """Those that no table has, or several."""
    return sorted(operator for operator in operators if sum(operator in table for table in tables) != 1)


def test_every_operator_has_a_formula_or_a_reason():
    assert missing(every_operator(), *TABLE) == [], "write a formula in graph_passes/macs, or the reason why none"


@pytest.mark.parametrize("operator", [("", "LSTM"), (MS, "FusedMatMul"), ("", "Relu"), (MS, "PagedAttention")])
def test_an_operator_that_the_table_lacks_is_found_by_name(operator):
    cut = [{key: entry for key, entry in table.items() if key != operator} for table in TABLE]
    assert missing({*every_operator(), operator}, *cut) == [operator]
    assert missing(["new"], *TABLE) == ["new"]


def test_every_operator_that_a_pass_splits_has_a_formula():
    from graph_passes.operators import PASSES, UNSPLIT

    for operator in [*((each.domain, each.op_type) for each in PASSES), *UNSPLIT]:
        assert operator in operators.FORMULAS or operator in no_products.UNKNOWN or operator[1].startswith("Gather"), (
            operator
        )
    for each in PASSES:
        assert not why_not_counted(each.domain, each.op_type)
