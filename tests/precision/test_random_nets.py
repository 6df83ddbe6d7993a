"""Random nets, split and lowered: they load at every optimization level of onnxruntime, with equal answers.

Levels differ in the order of sums: integers where operators are fused, floats where they are not. A number between two
codes may therefore become the other one, which moves it by one step; that is rare, and concerns single samples. So at
most three steps anywhere are allowed (flips in two layers, and their effect on the last one), and a quarter of a step
in the root mean square: as if all answers of one of the eight samples moved by 0.7 steps. A step is 1/255 of the range
of the float net's answers.
"""

import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, assume, given, settings
from random_nets import SAMPLES, cases

from rsi_deploy.precision.lowering import CalibrationFeeds, lower

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}
LEVELS = [
    getattr(ort.GraphOptimizationLevel, f"ORT_{name}")
    for name in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")
]
MOST_STEPS, MEAN_STEPS = 3.0, 0.25
LOST = {8: 0.3, 4: 0.5, 3: 1.5}
"""Fewest bits -> relative L2 distance that a lowered net of up to seven layers with random weights stays below."""


def run(path, feeds, level):
    options = ort.SessionOptions()
    options.graph_optimization_level, options.intra_op_num_threads, options.log_severity_level = level, 1, 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def is_same(came, expected, span):
    difference = np.abs(came - expected) / (span / 255)
    return difference.max() <= MOST_STEPS and np.sqrt(np.mean(difference**2)) <= MEAN_STEPS


def lowered(case, folder):
    """Write the float net and the lowered one, and return the answers of the float one and of each level."""
    logging.disable(logging.WARNING)
    onnx.save(case.proto, folder / "float.onnx")
    data = CalibrationFeeds(feeds=lambda: iter([case.feeds]), samples=SAMPLES)
    lower(folder / "float.onnx", folder / "low.onnx", case.lowering, data)
    expected = run(folder / "float.onnx", case.feeds, LEVELS[-1])
    assume(np.ptp(expected) > 1e-3)  # behind a Relu that is always closed there is nothing to compare
    return expected, [run(folder / "low.onnx", case.feeds, level) for level in LEVELS]


def check(case, folder):
    expected, answers = lowered(case, folder)
    bits = min([8, *case.lowering.bits.values(), *case.lowering.tables.values()])
    bits = 4 if bits == 5 else bits
    distance = np.linalg.norm(answers[-1] - expected) / np.linalg.norm(expected)
    assert distance < LOST[bits], (distance, case.lowering)
    for answer in answers[1:]:
        assert is_same(answer, answers[0], np.ptp(expected)), case.lowering


@given(case=cases())
@settings(max_examples=15, **SETTINGS)
def test_random_nets(tmp_path_factory, case):
    check(case, tmp_path_factory.mktemp("net"))


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=500, **SETTINGS)
def test_many_random_nets(tmp_path_factory, case):
    check(case, tmp_path_factory.mktemp("net"))


def worse_scale(path):
    """Make every number of one stored weight larger by a tenth; return whether there was one."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = [n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"]
    scales += [n for node in model.graph.node if node.op_type == "Mul" for n in node.input]
    for name in scales:
        tensor = stored.get(name)
        if tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1:
            array = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array((array * np.float32(1.1)).astype(np.float32), name))
            onnx.save(model, path)
            return True
    return False


def test_a_wrong_weight_is_noticed(tmp_path_factory):
    noticed = []

    @given(case=cases())
    @settings(max_examples=40, **SETTINGS)
    def collect(case):
        folder = tmp_path_factory.mktemp("net")
        expected, answers = lowered(case, folder)
        assume(worse_scale(folder / "low.onnx"))
        answer = run(folder / "low.onnx", case.feeds, LEVELS[-1])
        noticed.append(not is_same(answer, answers[-1], np.ptp(expected)))

    collect()
    assert len(noticed) >= 20
    assert np.mean(noticed) >= 0.8
