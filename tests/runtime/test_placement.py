import json
import logging

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime import placement

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,4] y) { a = Sin(x)  b = Relu(a)  y = Softmax(b) }"""
FEEDS = {"x": np.ones((2, 4), np.float32)}


@pytest.fixture
def model(tmp_path):
    onnx.save(parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_every_node_of_a_real_run_is_counted(model, tmp_path):
    before = set(tmp_path.iterdir())
    ran = placement.node_placement(model, "cpu", FEEDS)
    assert ran.provider_nodes == {"CPUExecutionProvider": 3}
    assert set(ran.nodes.values()) == {"CPUExecutionProvider"}
    assert sorted(ran.ops.values()) == ["Relu", "Sin", "Softmax"]
    assert ran.memcpy_nodes == 0
    assert set(tmp_path.iterdir()) == before


def kernel(name, provider, op="MatMul", index="0"):
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "args": {"provider": provider, "op_name": op, "node_index": index},
    }


def test_profiles_are_counted_by_provider():
    events = [
        kernel("a", "CUDA"),
        kernel("a", "CUDA"),  # the same node again: a loop
        kernel("b", "CPU", index="1"),
        kernel("copy", "CUDA", "MemcpyFromHost", "2"),
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "b_fence_before", "args": {"provider": "CPU"}},
    ]
    ran = placement.parse_profile(json.loads(json.dumps(events)))
    assert ran.provider_nodes == {"CPU": 1, "CUDA": 2}
    assert ran.memcpy_nodes == 1
    assert ran.nodes == {"a": "CUDA", "b": "CPU", "copy": "CUDA"}
    assert ran.ops == {"a": "MatMul", "b": "MatMul", "copy": "MemcpyFromHost"}
    assert placement.parse_profile([]).provider_nodes == {}


def test_a_provider_that_runs_nothing_is_refused_unless_allowed(model, monkeypatch):
    elsewhere = placement.parse_profile([kernel("a", "OtherExecutionProvider")])
    monkeypatch.setattr(placement, "node_placement", lambda *_: elsewhere)
    with pytest.raises(UsageError, match=r"m\.onnx.*CPUExecutionProvider.*ran no node.*1 on Other.*--allow-fallback"):
        placement.proven_placement(model, "cpu", FEEDS)
    assert placement.proven_placement(model, "cpu", FEEDS, allow_fallback=True) is elsewhere
    monkeypatch.undo()
    assert placement.proven_placement(model, "cpu", FEEDS).provider_nodes


@pytest.mark.parametrize("op", ["MatMul", "FusedConv", "Attention", "LSTM", "MatMulNBits"])
def test_work_that_ran_elsewhere_is_refused_unless_allowed(model, monkeypatch, op):
    mixed = [kernel("a", "CPUExecutionProvider"), kernel("big", "OtherExecutionProvider", op, "1")]
    monkeypatch.setattr(placement, "node_placement", lambda *_: placement.parse_profile(mixed))
    with pytest.raises(UsageError, match=rf"1 nodes with most of the work.*big \({op}\) on Other.*--allow-fallback"):
        placement.proven_placement(model, "cpu", FEEDS)
    assert placement.proven_placement(model, "cpu", FEEDS, allow_fallback=True).nodes["big"].startswith("Other")


@pytest.mark.parametrize("op", ["Shape", "Gather", "Concat", "MemcpyToHost"])
def test_shape_arithmetic_elsewhere_is_only_recorded(model, monkeypatch, op):
    mixed = [kernel("a", "CPUExecutionProvider"), kernel("small", "OtherExecutionProvider", op, "1")]
    monkeypatch.setattr(placement, "node_placement", lambda *_: placement.parse_profile(mixed))
    assert placement.proven_placement(model, "cpu", FEEDS).nodes["small"] == "OtherExecutionProvider"


def test_options_reach_the_profiled_session(model):
    with pytest.raises(UsageError, match="thread"):
        placement.node_placement(model, "cpu:thread=1", FEEDS)
    assert placement.node_placement(model, "cpu:optimization=disabled,threads=1", FEEDS).provider_nodes


def test_the_library_does_not_print(model, capsys, caplog):
    with caplog.at_level(logging.DEBUG):
        placement.node_placement(model, "cpu", FEEDS)
    assert capsys.readouterr().out == ""
