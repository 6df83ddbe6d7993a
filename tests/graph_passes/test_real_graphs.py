"""Four graphs that others made, at full rank: a record for every weight-bearing node, and the same outputs."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from split_checks import error, full_rank

from graph_passes import FoldBatchNormPass, Split, SplitFactors, split
from graph_passes.operators import PASSES, UNSPLIT

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "onnx"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model files in {FOLDER}")

RNG = np.random.default_rng(0)
GRAPHS = {
    "dtln/model_1.onnx": (
        {"input_2": RNG.random((1, 1, 257), np.float32), "input_3": RNG.random((1, 2, 128, 2), np.float32)},
        {("MatMul", "split"): 1, ("LSTM", "no pass splits LSTM"): 2},
    ),
    "magika/standard_v3_3.onnx": (
        {"bytes": RNG.integers(0, 257, (2, 2048), np.int32)},
        {("MatMul", "split"): 2, ("Conv", "split"): 1},
    ),
    "silero_vad/silero_vad.onnx": (
        {
            "input": RNG.standard_normal((2, 512), np.float32),
            "state": np.zeros((2, 2, 128), np.float32),
            "sr": np.array(16000),
        },
        {("Conv", "split"): 12, ("LSTM", "weight is computed by Concat: fold constants first"): 4},
    ),
    "ultralight_face/version-RFB-320.onnx": (
        {"input": RNG.standard_normal((1, 3, 240, 320), np.float32)},
        {("Conv", "split"): 52},
    ),
}


def outputs(model: ir.Model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("fold", [False, True], ids=["as it is", "folded first"])
@pytest.mark.parametrize("name", GRAPHS)
def test_full_rank(name, fold):
    feeds, expected_records = GRAPHS[name]
    model = ir.load(FOLDER / name)
    expected = outputs(model, feeds)
    if fold:
        FoldBatchNormPass(overridable=True)(model)
    records = split(model, full_rank, overridable=True)
    kinds = Counter((r.op_type, "split" if isinstance(r, Split) else r.reason) for r in records)
    assert kinds == expected_records
    nodes = Counter(node.op_type for node in model.graph.all_nodes())
    for operator in {op_type for op_type, _ in expected_records}:
        twice = 2 if any(operator == each.op_type for each in PASSES) else 1
        assert nodes[operator] >= twice * sum(n for (o, _), n in kinds.items() if o == operator)
    assert all(("", operator) in UNSPLIT or operator in ("MatMul", "Conv") for operator, _ in kinds)
    assert all(error(a, b) <= 1e-4 for a, b in zip(outputs(model, feeds), expected, strict=True))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not any(isinstance(record, Split) for record in split(model, full_rank, overridable=True))


@pytest.mark.parametrize("name", GRAPHS)
def test_wrong_factors_are_noticed(name):
    def sabotaged(site):
        factors = full_rank(site)
        return SplitFactors(left=-factors.left, right=factors.right)

    feeds, _ = GRAPHS[name]
    model = ir.load(FOLDER / name)
    expected = outputs(model, feeds)
    split(model, sabotaged, overridable=True)
    assert any(error(a, b) > 1e-3 for a, b in zip(outputs(model, feeds), expected, strict=True))


def test_inputs_that_are_weights_stay_unless_the_user_says_they_are_constant():
    model = ir.load(FOLDER / "ultralight_face/version-RFB-320.onnx")
    records = split(model, full_rank)
    assert len(records) == 52
    assert {record.reason for record in records} == {
        "overridable: the weight is a graph input too, remove it from the inputs"
    }
