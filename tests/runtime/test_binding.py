import gc
import types

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import parser

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime import binding
from rsi_deploy.runtime.binding import TensorDevice, bind, bound_call, device_of
from rsi_deploy.runtime.provider_spec import ProviderSpec
from rsi_deploy.runtime.sessions import make_session


def session_of(body, inputs="float[N,4] x", outputs="float[N,4] y"):
    text = f'<ir_version: 10, opset_import: ["" : 21]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    return make_session(parser.parse_model(text).SerializeToString(), "cpu:threads=1")


def spec(name="CUDA", **options):
    return ProviderSpec(name=f"{name}ExecutionProvider", session={}, options=options)


def test_a_bound_call_computes_what_a_plain_run_does():
    session = session_of("y = Softmax(x)")
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    bound = bind(session, feeds)
    bound.call()
    np.testing.assert_array_equal(bound.outputs()[0], session.run(None, feeds)[0])
    assert (str(bound.device), "host memory" in bound.how) == ("cpu", True)


def test_every_call_computes_anew():
    """On the host the array itself is bound: what is written into it shows in the next output."""
    feeds = {"x": np.ones((1, 4), np.float32)}
    bound = bind(session_of("y = Relu(x)"), feeds)
    feeds["x"][:] = 3
    assert (bound.outputs()[0] == 1).all()
    bound.call()
    assert (bound.outputs()[0] == 3).all()


def test_a_call_keeps_what_is_bound_alive():
    feeds = {"x": np.full((1, 4), 5, np.float32)}
    session = session_of("y = Relu(x)")
    bound = bind(session, feeds)
    call, outputs = bound.call, bound.outputs
    del feeds, bound, session
    gc.collect()
    _ = [np.full((1, 4), 9, np.float32) for _ in range(1000)]  # whoever reads freed memory finds nines
    call()
    assert (outputs()[0] == 5).all()


def test_several_inputs_types_and_outputs():
    session = session_of(
        "y = Where(c, h, g)  n = Add(i, i)  s = Shape(i)",
        "float16[N,4] h, float16[N,4] g, bool[N,4] c, int64[N] i",
        "float16[N,4] y, int64[N] n, int64[1] s",
    )
    feeds = {
        "h": np.ones((2, 4), np.float16),
        "g": np.zeros((2, 4), np.float16),
        "c": np.array([[True, False] * 2] * 2),
        "i": np.array([3, 4]),
    }
    bound = bind(session, feeds)
    bound.call()
    y, n, s = bound.outputs()
    np.testing.assert_array_equal(y, feeds["c"].astype(np.float16))
    assert (n.tolist(), s.tolist()) == ([6, 8], [2])


def test_scalars_strided_arrays_and_bfloat16():
    session = session_of("y = Mul(x, k)", "float[N,4] x, float k")
    wide = np.arange(16, dtype=np.float32).reshape(2, 8)[:, ::2]
    bound = bind(session, {"x": wide, "k": np.asarray(2, np.float32)})
    bound.call()
    np.testing.assert_array_equal(bound.outputs()[0], 2 * wide)
    session = session_of("y = Cast <to = 1> (x)", "bfloat16[N,4] x")
    bound = bind(session, {"x": np.full((1, 4), 1.5, ml_dtypes.bfloat16)})
    bound.call()
    assert (bound.outputs()[0] == 1.5).all()


def test_outputs_that_are_not_tensors_are_run_unbound_with_a_note():
    session = session_of("y = SequenceConstruct(x, x)", outputs="seq(float[N,4]) y")
    bound = bind(session, {"x": np.ones((1, 4), np.float32)})
    bound.call()
    assert "plain session.run" in bound.how
    assert len(bound.outputs()[0]) == 2


def test_a_failing_run_is_ours():
    session = session_of("s = Constant <value = int64[1] {7}> ()  y = Reshape(x, s)", outputs="float[K] y")
    with pytest.raises(ModelError, match="bound inputs and outputs failed on cpu"):
        bound_call(session, {"x": np.ones((1, 4), np.float32)})
    with pytest.raises(ModelError):
        bound_call(session_of("y = Relu(x)"), {"z": np.ones((1, 4), np.float32)})


@pytest.mark.parametrize(
    ("provider", "device"),
    [
        (spec("CUDA"), TensorDevice(kind="cuda")),
        (spec("CUDA", device_id="3"), TensorDevice(kind="cuda", number=3)),
        (spec("Tensorrt", device_id="1"), TensorDevice(kind="cuda", number=1)),
        (spec("NvTensorRTRTX"), TensorDevice(kind="cuda")),
        (spec("OpenVINO", device_type="GPU"), TensorDevice(kind="cpu")),
        (spec("CPU"), TensorDevice(kind="cpu")),
        (spec("SomethingNew"), TensorDevice(kind="cpu")),
    ],
)
def test_where_tensors_are_bound(provider, device):
    assert device_of(provider, [provider.name, "CPUExecutionProvider"]) == device
    assert device_of(provider, ["CPUExecutionProvider"]) == TensorDevice(kind="cpu")  # an allowed fallback
    assert str(TensorDevice(kind="cuda", number=3)) == "cuda:3"


def test_a_device_number_that_is_none_is_refused():
    with pytest.raises(UsageError, match="device_id takes a number of 0 or more, but got 'one'"):
        device_of(spec("CUDA", device_id="one"), ["CUDAExecutionProvider"])


@pytest.fixture
def gpu(monkeypatch):
    """A session that claims CUDA and records the calls."""
    log = []

    class Value:
        @staticmethod
        def ortvalue_from_numpy(array, kind, number):
            log.append(("copy", kind, number))
            return array

        @staticmethod
        def ortvalue_from_shape_and_type(shape, element_type, kind, number):
            log.append(("allocate", tuple(shape), element_type, kind, number))

    class Binding:
        def __getattr__(self, name):
            return lambda *args: log.append((name, *args))

        def get_outputs(self):
            return [types.SimpleNamespace(shape=lambda: [2], element_type=lambda: 1)]

    class Options:
        def add_run_config_entry(self, key, value):
            self.graph = (key, value)

    session = types.SimpleNamespace(
        get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_outputs=lambda: [types.SimpleNamespace(name="y", type="tensor(float)")],
        io_binding=Binding,
        run_with_iobinding=lambda binding, options: log.append(("run", options and options.graph)),
    )
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    monkeypatch.setattr(onnxruntime, "RunOptions", Options)
    session.log = log
    return session


def test_on_a_gpu_tensors_lie_on_the_device_and_every_call_is_synchronised(gpu):
    bound = bind(gpu, {"x": np.ones(2)}, spec(device_id="1"))
    assert ("copy", "cuda", 1) in gpu.log
    assert ("bind_output", "y", "cuda", 1) in gpu.log
    assert ("allocate", (2,), 1, "cuda", 1) in gpu.log
    names = [entry[0] for entry in gpu.log]
    assert names.index("synchronize_inputs") < names.index("run") < names.index("synchronize_outputs")
    gpu.log.clear()
    bound.call()
    assert gpu.log == [("run", None), ("synchronize_outputs",)]
    assert "cuda:1" in bound.how
    assert "graph" not in bound.how


def test_a_cuda_graph_is_replayed_by_the_binding_it_was_captured_with(gpu):
    numbers = set()
    for key in ("enable_cuda_graph", "trt_cuda_graph_enable"):
        gpu.log.clear()
        bound = bind(gpu, {"x": np.ones(2)}, spec(**{key: "1"}))
        first, captured = (entry[1] for entry in gpu.log if entry[0] == "run")
        assert first == ("gpu_graph_id", "-1")  # its outputs are not those of the binding
        assert f"replayed as a CUDA graph ({key}=1)" in bound.how
        gpu.log.clear()
        bound.call()
        assert gpu.log[0] == ("run", captured)
        numbers.add(captured)
    assert len(numbers) == 2
    gpu.get_outputs = lambda: [types.SimpleNamespace(name="y", type="seq(tensor(float))")]
    with pytest.raises(UsageError, match="run it with enable_cuda_graph=0"):
        bind(gpu, {"x": np.ones(2)}, spec(enable_cuda_graph="1"))


def test_bfloat16_cannot_be_copied_to_a_device():
    with pytest.raises(UsageError, match="bfloat16 inputs cannot be bound to cuda:0"):
        binding.on_device(np.ones(2, ml_dtypes.bfloat16), TensorDevice(kind="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"use_tf32": "0"}, {"enable_cuda_graph": "1"}])
def test_a_real_gpu_computes_what_the_cpu_does(options):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime here has no CUDA; pip uninstall onnxruntime && pip install onnxruntime-gpu")
    text = '<ir_version: 10, opset_import: ["" : 21]>\ng (float[2,4] x) => (float[2,4] y) { y = Softmax(x) }'
    proto = parser.parse_model(text).SerializeToString()
    feeds = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    bound = bind(make_session(proto, spec(**options)), feeds, spec(**options))
    for _ in range(3):
        bound.call()
    np.testing.assert_allclose(bound.outputs()[0], make_session(proto).run(None, feeds)[0], rtol=1e-5)
