import json
import logging
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure import providers

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,4] y) { a = Sin(x)  b = Relu(a)  y = Softmax(b) }"""
FEEDS = {"x": np.ones((2, 4), np.float32)}


@pytest.fixture
def model(tmp_path):
    onnx.save(parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_the_modules_load_neither_torch_nor_onnxruntime():
    names = ["accuracy", "data", "inputs", "latency", "machine", "preprocess", "providers"]
    code = "import sys\n" + "\n".join(f"import rsi_deploy.measure.{name}" for name in names)
    code += "\nprint({'torch', 'torchvision', 'onnxruntime', 'onnx'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["cpu", "CPU", " Cpu ", "CPUExecutionProvider", "cpuexecutionprovider"])
def test_any_spelling_of_cpu(name):
    assert providers.resolve(name) == "CPUExecutionProvider"


def test_plug_in_providers_are_found(monkeypatch):
    class Device:
        ep_name = "OpenVINOExecutionProvider"

    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [Device(), Device()], raising=False)
    assert providers.available().count("OpenVINOExecutionProvider") == 1
    assert providers.resolve("openvino") == "OpenVINOExecutionProvider"


def test_an_old_onnxruntime_without_plug_ins(monkeypatch):
    monkeypatch.delattr(onnxruntime, "get_ep_devices", raising=False)
    assert "CPUExecutionProvider" in providers.available()


def test_an_absent_provider_says_what_there_is_and_what_to_install(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError) as caught:
        providers.resolve("gpu")
    for part in ("'gpu'", "available: cpu", "pip uninstall onnxruntime && pip install onnxruntime-gpu"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="onnxruntime-teapot"):
        providers.resolve("teapot")


def test_two_distributions_over_each_other_are_told(monkeypatch):
    both = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(providers, "onnxruntime_distributions", lambda: both)
    with pytest.raises(UsageError, match="overwrite each other"):
        providers.resolve("teapot")
    monkeypatch.setattr(providers, "onnxruntime_distributions", lambda: {"onnxruntime": "1.0"})
    with pytest.raises(UsageError) as caught:
        providers.resolve("teapot")
    assert "overwrite" not in str(caught.value)


def test_sessions_from_path_text_and_bytes_agree(model):
    for source in (model, str(model), model.read_bytes()):
        session = providers.make_session(source, "cpu", threads=1, prepack=False, spin_between_runs=False)
        (result,) = providers.run_session(session, FEEDS, "m")
        np.testing.assert_allclose(result, 0.25, rtol=1e-6)


def test_a_silent_fallback_is_refused(model, monkeypatch):
    """onnxruntime is made to claim a provider that it then does not start, as with missing CUDA libraries."""
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(UsageError, match=r"m\.onnx: asked for CUDA.*fell back to CPU.*onnxruntime-gpu"):
        providers.make_session(model, "cuda")
    assert providers.make_session(model, "cpu").get_providers()[0] == "CPUExecutionProvider"


def test_a_failing_run_does_not_move_to_another_provider(model):
    assert providers.make_session(model)._enable_fallback is False


def test_models_that_cannot_load_are_named(model, tmp_path):
    with pytest.raises(ModelError, match=r"absent\.onnx: no such file"):
        providers.make_session(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.onnx.*INVALID_PROTOBUF"):
        providers.make_session(tmp_path / "text.onnx")
    onnx.save(parser.parse_model(TEXT.replace("Sin", "Sine")), tmp_path / "unknown.onnx")
    with pytest.raises(ModelError, match=r"unknown\.onnx.*Sine"):
        providers.make_session(tmp_path / "unknown.onnx")
    with pytest.raises(ModelError, match="the model in memory"):
        providers.make_session(b"hello")
    with pytest.raises(UsageError, match="got 0"):
        providers.make_session(model, threads=0)


def test_a_failing_run_is_named(model):
    with pytest.raises(ModelError, match=r"m\.onnx: the run failed"):
        providers.run_session(providers.make_session(model), {"z": FEEDS["x"]}, str(model))


def test_placement_counts_every_node_of_a_real_run(model, tmp_path):
    before = set(tmp_path.iterdir())
    placement = providers.node_placement(model, "cpu", FEEDS)
    assert placement.provider_nodes == {"CPUExecutionProvider": 3}
    assert set(placement.nodes.values()) == {"CPUExecutionProvider"}
    assert placement.memcpy_nodes == 0
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
    placement = providers.parse_profile(json.loads(json.dumps(events)))
    assert placement.provider_nodes == {"CPU": 1, "CUDA": 2}
    assert placement.memcpy_nodes == 1
    assert placement.nodes == {"a": "CUDA", "b": "CPU", "copy": "CUDA"}
    assert providers.parse_profile([]).provider_nodes == {}


def test_a_provider_that_runs_nothing_is_refused(model, monkeypatch):
    elsewhere = providers.parse_profile([kernel("a", "OtherExecutionProvider")])
    monkeypatch.setattr(providers, "node_placement", lambda *_: elsewhere)
    with pytest.raises(UsageError, match=r"m\.onnx.*CPUExecutionProvider.*ran no node.*1 on Other"):
        providers.proven_placement(model, "cpu", FEEDS)
    monkeypatch.undo()
    assert providers.proven_placement(model, "cpu", FEEDS).provider_nodes


def test_the_library_does_not_print(model, capsys, caplog):
    with caplog.at_level(logging.DEBUG):
        providers.node_placement(model, "cpu", FEEDS)
    assert capsys.readouterr().out == ""
