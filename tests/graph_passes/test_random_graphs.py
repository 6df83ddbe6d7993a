"""Random graphs of every form, at full rank: onnxruntime says the same as before, and the corrections come on top."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from random_graphs import Case, cases
from split_checks import error, full_rank, numbers, run

from graph_passes import FactorSource, Split, SplitFactors, split

# In a function, which carries no shapes, a vector of the data looks like a matrix.
EXPECTED_SKIPS = ("weight is batched and the data's shape is unknown: infer shapes first",)
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def is_same(came: np.ndarray, expected: np.ndarray) -> bool:
    """A Relu may leave nothing but what rounding left of a sum, so absolute differences count too."""
    return error(came, expected) <= 1e-4 or np.abs(came - expected).max(initial=0) <= 1e-5


@functools.cache
def turns_what_stays() -> bool:
    """Whether this onnxruntime takes a Transpose that changes nothing for one that does, in a MatMul with a bias."""
    text = "<ir_version: 8, opset_import: ['' : 15]> g (float[1,1] x, float[2,1] w) => (float[2,1] y) { "
    text += "n = Transpose<perm = [0, 1]>(w)  m = MatMul(n, x)  y = Add(m, b) }"
    proto = onnx.parser.parse_model(text.replace("'", '"'))
    for name, array in (("w", numbers(2, 1)), ("b", numbers(2, 1))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    try:
        run(ir.from_proto(proto), x=numbers(1, 1))
    except InvalidArgument:
        return True
    return False


def stays(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and any(list(a.ints) == sorted(a.ints) for a in node.attribute)


def every_node(holder: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            yield from every_node(attribute.g)


def runs_here(proto: onnx.ModelProto) -> bool:
    holders = [proto.graph, *proto.functions]
    return not turns_what_stays() or not any(stays(node) for holder in holders for node in every_node(holder))


def check(case: Case, factors: FactorSource | None = None) -> None:
    proto = case.proto
    assume(runs_here(proto))
    onnx.checker.check_model(proto, full_check=True)
    model, x = ir.from_proto(proto), numbers(*case.data, seed=7)
    expected = run(ir.from_proto(case.reference), x=x)
    signature = [(v.name, v.dtype, v.shape) for v in model.graph.outputs]
    records = split(model, factors or case.factors, overridable=True)
    if factors is None:
        assert all(r.form == case.forms.get(r.node, r.form) for r in records if isinstance(r, Split))
    assert all(isinstance(r, Split) or (r.reason in EXPECTED_SKIPS and model.functions) for r in records), records
    rewritten = ir.to_proto(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert is_same(run(model, x=x), expected)
    assert is_same(run(model, "ORT_DISABLE_ALL", x=x), expected)
    assert [(v.name, v.dtype, v.shape) for v in model.graph.outputs] == signature
    assert (model.ir_version, model.opset_imports) == (proto.ir_version, ir.from_proto(proto).opset_imports)
    again = ir.from_proto(rewritten)
    assert not any(isinstance(record, Split) for record in split(again, full_rank, overridable=True))
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(ir.from_proto(rewritten)).SerializeToString()


@given(case=cases())
@settings(max_examples=200, **SETTINGS)
def test_random_graphs(case):
    check(case)


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=10_000, **SETTINGS)
def test_many_random_graphs(case):
    check(case)


def worse_left(factors: SplitFactors) -> SplitFactors:
    return dataclasses.replace(factors, left=(factors.left * 1.01).astype(factors.left.dtype))


def worse_bias(factors: SplitFactors) -> SplitFactors:
    if factors.bias is None:
        return factors
    return dataclasses.replace(factors, bias=(factors.bias * 1.1).astype(factors.left.dtype))


@pytest.mark.parametrize("worse", [worse_left, worse_bias])
def test_wrong_factors_are_noticed(worse):
    noticed = []

    @given(case=cases())
    @settings(max_examples=100, **SETTINGS)
    def collect(case):
        assume(runs_here(case.proto))
        model, x = ir.from_proto(case.proto), numbers(*case.data, seed=7)
        expected = run(ir.from_proto(case.reference), x=x)
        split(model, lambda site: worse(case.factors(site)), overridable=True)
        if expected.any() and (worse is worse_left or case.corrections):
            noticed.append(not is_same(run(model, x=x), expected))

    collect()
    assert len(noticed) >= 40
    assert np.mean(noticed) >= 0.9
