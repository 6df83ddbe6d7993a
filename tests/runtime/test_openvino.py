"""A second real provider. `make openvino` runs these in an environment of their own; elsewhere they skip.

Nothing here needs torch: that environment has what `rsi-deploy bench` needs, and no more.
"""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

NAME = "OpenVINOExecutionProvider"


def offered():
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime

    return NAME in onnxruntime.get_available_providers()


pytestmark = [
    pytest.mark.openvino,
    pytest.mark.skipif(not offered(), reason="onnxruntime here has no OpenVINO: run make openvino"),
]


@pytest.fixture
def model(tmp_path):
    """A 3x3 convolution and a matrix product on `(N, 3, 8, 8)`."""
    rng = np.random.default_rng(0)
    weights = {"k": rng.standard_normal((4, 3, 3, 3)), "w": rng.standard_normal((256, 5))}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, 1, s) for n, s in (("x", ["N", 3, 8, 8]), ("y", ["N", 5])))
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "net", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def feeds():
    return {"x": np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)}


def bench(*arguments):
    code = "from rsi_deploy.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, "bench", *map(str, arguments)], capture_output=True, text=True)


def test_it_computes_what_the_cpu_does(model, feeds):
    from rsi_deploy.runtime.binding import bind
    from rsi_deploy.runtime.sessions import make_session

    expected = make_session(model, "cpu").run(None, feeds)[0]
    bound = bind(make_session(model, "openvino"), feeds, "openvino")
    bound.call()
    np.testing.assert_allclose(bound.outputs()[0], expected, rtol=1e-3, atol=1e-3)
    assert np.abs(expected).max() > 1  # the tolerance would pass zeros otherwise


def test_the_nodes_run_on_it(model, feeds):
    from rsi_deploy.runtime.placement import node_placement, proven_placement

    ran = proven_placement(model, "openvino:device_type=CPU,num_of_threads=1", feeds)
    assert set(ran.nodes.values()) == {NAME}
    assert set(node_placement(model, "cpu", feeds).nodes.values()) == {"CPUExecutionProvider"}


def test_bench_measures_on_it(model):
    done = bench(model, model, "--provider", "openvino", "--seconds", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout
    assert "torch" not in json.dumps(json.loads(done.stdout)).lower() or importlib.util.find_spec("torch")


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("openvino:nonsense=1", "'nonsense' does not exist; every provider takes threads"),
        ("openvino:nonsense=1", "openvino also takes device_type"),
        ("openvino:device_type=GPU", "OpenVINOExecutionProvider was requested, but onnxruntime fell back to CPU"),
        ("openvino:device_type=GPU", "Try it without device_type=GPU"),
        ("openvino:device_type=Toaster", "ran no node of this model"),
        ("cuda", "available: openvino, cpu"),
    ],
)
def test_what_does_not_run_on_it_is_refused(model, provider, said):
    done = bench(model, "--provider", provider, "--seconds", "0.2")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fallback_that_is_allowed_is_recorded(model, feeds):
    from rsi_deploy.runtime.placement import proven_placement

    ran = proven_placement(model, "openvino:device_type=Toaster", feeds, allow_fallback=True)
    assert set(ran.nodes.values()) == {"CPUExecutionProvider"}


def test_options_are_refused_or_taken_one_by_one(model):
    from rsi_deploy.core.errors import UsageError
    from rsi_deploy.runtime.sessions import effective_options, make_session

    session = make_session(model, "openvino:num_of_threads=1,device_type=CPU")
    assert effective_options(session, "openvino:num_of_threads=1")["num_of_threads"] == "1"
    with pytest.raises(UsageError, match="'num_of_thread' does not exist"):
        make_session(model, "openvino:num_of_thread=1,device_type=CPU")
