import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime import sessions

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,4] y) { a = Sin(x)  b = Relu(a)  y = Softmax(b) }"""
FEEDS = {"x": np.ones((2, 4), np.float32)}
CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def model(tmp_path):
    onnx.save(parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def gpu(monkeypatch):
    """An onnxruntime that offers CUDA and starts it, as far as anybody can ask: it lists the options given.

    Set `refuse` to what creating a session shall raise, and `lists` to what the provider lists of itself.
    """

    class Fake:
        refuse = ""

        def __init__(self, model, options, providers, enable_fallback):
            assert enable_fallback == 0
            self.providers = providers
            Fake.chains.append(providers)
            if providers[0][1] and Fake.refuse:
                raise RuntimeError(Fake.refuse)

        def get_providers(self):
            return [name for name, _ in self.providers]

        def get_provider_options(self):
            name, given = self.providers[0]
            return {name: {**Fake.lists, **given} if Fake.lists else {}}

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider", *CUDA])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fake)
    sessions.known_options.cache_clear()
    Fake.chains = []
    names = ("device_id", "use_tf32", "enable_cuda_graph", "cudnn_conv_algo_search")
    Fake.lists = dict(zip(names, ("0", "1", "0", "EXHAUSTIVE"), strict=True))
    yield Fake
    sessions.known_options.cache_clear()


def test_sessions_from_path_text_and_bytes_agree(model):
    for source in (model, str(model), model.read_bytes()):
        session = sessions.make_session(source, "cpu", threads=1, prepack=False, spin_between_runs=False)
        (result,) = sessions.run_session(session, FEEDS, "m")
        np.testing.assert_allclose(result, 0.25, rtol=1e-6)


def test_options_of_the_provider_win_over_arguments(model):
    options = sessions.make_session(model, "cpu:threads=1,spinning=on", spin_between_runs=False).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "0"
    stopped = sessions.make_session(model, "cpu", spin_between_runs=False).get_session_options()
    assert stopped.get_session_config_entry("session.force_spinning_stop") == "1"


def test_two_numbers_of_threads_contradict_each_other(model):
    sessions.make_session(model, "cpu:threads=2", threads=2)
    with pytest.raises(UsageError, match="1 threads and --provider cpu:threads=2 contradict"):
        sessions.make_session(model, "cpu:threads=2", threads=1)


DENORMALS = """
import sys
import numpy as np
from onnx import parser
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.sessions import make_session
text = '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y) { y = Mul(x, x) }'
for requested in sys.argv[1:]:
    try:
        session = make_session(parser.parse_model(text).SerializeToString(), f"cpu:threads=1{requested}")
        print(bool(session.run(None, {"x": np.full((1, 4), 2.0**-70, np.float32)})[0].any()))
    except UsageError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        (["", ",denormals=keep"], ["True", "True"]),  # 2**-140 is kept: above zero, below the normal 2**-126
        ([",denormals=zero"], ["False"]),
        (["", ",denormals=zero"], ["True", "denormals=zero conflicts with an earlier session"]),
        ([",denormals=zero", ",denormals=keep"], ["False", "denormals=keep conflicts"]),
    ],
)
def test_denormals_are_flushed_for_real_or_refused(requested, expected):
    done = subprocess.run([sys.executable, "-c", DENORMALS, *requested], capture_output=True, text=True, check=True)
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA starts here")
def test_a_silent_fallback_is_refused(model, monkeypatch):
    """onnxruntime is made to claim a provider that it then does not start, as with missing CUDA libraries."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: CUDA)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(
        UsageError, match=r"m\.onnx: CUDAExecutionProvider was requested.*fell back to CPU.*onnxruntime-gpu"
    ):
        sessions.make_session(model, "cuda")
    assert sessions.make_session(model, "cpu").get_providers()[0] == "CPUExecutionProvider"
    allowed = sessions.make_session(model, "cuda", allow_fallback=True)
    assert allowed.get_providers() == ["CPUExecutionProvider"]


def test_an_option_that_the_provider_does_not_list_is_refused_before_the_model_loads(model, gpu):
    with pytest.raises(UsageError) as caught:
        sessions.make_session(model, "cuda:use_tf23=0")
    for part in ("'use_tf23' does not exist", "threads", "cuda also takes", "use_tf32", "enable_cuda_graph"):
        assert part in str(caught.value)
    assert gpu.chains == [[("CUDAExecutionProvider", {})]]  # the question alone
    sessions.make_session(model, "cuda:use_tf32=0")
    assert gpu.chains[-1] == [("CUDAExecutionProvider", {"use_tf32": "0"})]


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ("Invalid OpenVINO EP option: use_tf23", "'use_tf23' does not exist"),
        ("Failed to parse provider option use_tf23: banana is no bool", "cuda refuses use_tf23=banana"),
    ],
)
def test_an_option_that_the_provider_refuses_itself(model, gpu, refusal, expected):
    gpu.lists, gpu.refuse = {}, refusal
    with pytest.raises(UsageError, match=expected):
        sessions.make_session(model, "cuda:use_tf23=banana")


def test_another_failure_is_the_models(model, gpu):
    gpu.refuse = "CUDA failure 2: out of memory"
    with pytest.raises(ModelError, match="out of memory"):
        sessions.make_session(model, "cuda:use_tf32=0")


def test_tensorrt_leaves_over_to_cuda_on_the_same_device(model, gpu):
    sessions.make_session(model, "trt:device_id=1")
    assert gpu.chains[-1] == [
        ("TensorrtExecutionProvider", {"device_id": "1"}),
        ("CUDAExecutionProvider", {"device_id": "1"}),
    ]


def test_effective_options_include_the_defaults(model, gpu):
    session = sessions.make_session(model, "cuda:use_tf32=0,threads=2")
    settings = sessions.effective_options(session, "cuda:use_tf32=0,threads=2")
    assert settings["use_tf32"] == "0"
    assert settings["threads"] == "2"
    assert settings["cudnn_conv_algo_search"] == "EXHAUSTIVE"


@pytest.mark.parametrize(
    ("provider", "settings", "expected"),
    [
        ("CUDAExecutionProvider", {"use_tf32": "1"}, "TF32 is on"),
        ("CUDAExecutionProvider", {}, "TF32 is on"),
        ("CUDAExecutionProvider", {"use_tf32": "0"}, "TF32 is off"),
        ("TensorrtExecutionProvider", {"trt_fp16_enable": "1"}, "lower precision is on: trt_fp16_enable"),
        ("TensorrtExecutionProvider", {}, "16- and 8-bit arithmetic is off"),
    ],
)
def test_only_nvidia_has_notes_on_arithmetic(provider, settings, expected):
    assert expected in " ".join(sessions.numeric_notes(settings, provider))
    assert sessions.numeric_notes(settings, "CPUExecutionProvider") == []


def test_unconfirmed_options_are_noted(model, gpu):
    """A provider that lists nothing and refuses nothing may have taken an option or not."""
    session = sessions.make_session(model, "cuda:use_tf32=0")
    assert "confirmed" not in " ".join(sessions.session_notes(session, "cuda:use_tf32=0"))
    gpu.lists = {}
    assert sessions.session_notes(session, "cuda:use_tf32=0")[-1].endswith("use_tf32=0 is not confirmed")
    assert "confirmed" not in " ".join(sessions.session_notes(session, "cuda"))


def test_a_plug_in_is_added_by_its_devices(model, monkeypatch):
    """The CPU provider has a device too; without its place among those built in it is a plug-in like any other."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider"])
    session = sessions.make_session(model, "cpu:threads=1")
    assert session.get_providers()[0] == "CPUExecutionProvider"
    np.testing.assert_allclose(sessions.run_session(session, FEEDS, "m")[0], 0.25, rtol=1e-6)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", list)
    with pytest.raises(UsageError, match="'cpu:threads=1' is not offered"):
        sessions.make_session(model, "cpu:threads=1")


def test_an_operator_that_openvino_does_not_know_says_what_to_type(model, gpu):
    gpu.refuse = "OpenVINO does not support the following ONNX operations:\nAttention"
    with pytest.raises(ModelError, match="operations: Attention; .* export with --opset 20"):
        sessions.make_session(model, "cuda:use_tf32=0")


def test_cpu_lists_no_options_of_its_own():
    assert sessions.known_options("CPUExecutionProvider") == ()


def test_a_failing_run_does_not_move_to_another_provider(model):
    assert sessions.make_session(model)._enable_fallback is False


def test_models_that_cannot_load_are_named(model, tmp_path):
    with pytest.raises(ModelError, match=r"absent\.onnx: no such file"):
        sessions.make_session(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match=r"text\.onnx is not an ONNX file"):
        sessions.make_session(tmp_path / "text.onnx")
    onnx.save(parser.parse_model(TEXT.replace("Sin", "Sine")), tmp_path / "unknown.onnx")
    with pytest.raises(ModelError, match=r"unknown\.onnx.*Sine"):
        sessions.make_session(tmp_path / "unknown.onnx")
    with pytest.raises(ModelError, match="the model in memory"):
        sessions.make_session(b"hello")
    with pytest.raises(UsageError, match="got 0"):
        sessions.make_session(model, threads=0)


def test_a_failing_run_is_named(model):
    with pytest.raises(ModelError, match=r"m\.onnx: the run failed"):
        sessions.run_session(sessions.make_session(model), {"z": FEEDS["x"]}, str(model))


def test_an_option_that_a_session_has_lost_is_refused(model, gpu, monkeypatch):
    """Listed by the provider of a first session, and no more by the one that was made with it."""
    assert "use_tf32" in sessions.known_options("CUDAExecutionProvider")
    sessions.make_session(model, "cuda:use_tf32=0")
    monkeypatch.setattr(gpu, "get_provider_options", lambda self: {"CUDAExecutionProvider": {"device_id": "0"}})
    with pytest.raises(UsageError, match=r"'use_tf32' does not exist; .*; cuda also takes device_id$"):
        sessions.make_session(model, "cuda:use_tf32=0")
