import types

import onnxruntime
import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.provider_spec import SESSION_OPTIONS, ProviderSpec, parse_provider

CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def _cuda(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: CUDA)


def applied(text):
    options = onnxruntime.SessionOptions()
    parse_provider(text).apply_(options)
    return options


def test_a_name_alone():
    spec = parse_provider("cpu")
    assert (spec.name, dict(spec.session), dict(spec.options), str(spec)) == ("CPUExecutionProvider", {}, {}, "cpu")
    assert parse_provider(spec) is spec


def test_session_options_reach_onnxruntime():
    assert applied("cpu:threads=3").intra_op_num_threads == 3
    two = applied("cpu:inter_threads=2")
    assert (two.inter_op_num_threads, two.execution_mode) == (2, onnxruntime.ExecutionMode.ORT_PARALLEL)
    assert applied("cpu:inter_threads=1").execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert applied("cpu:arena=off").enable_cpu_mem_arena is False
    assert applied("cpu:arena=on").enable_cpu_mem_arena is True
    assert applied("cpu:memory_pattern=0").enable_mem_pattern is False
    level = onnxruntime.GraphOptimizationLevel
    assert applied("cpu:optimization=basic").graph_optimization_level == level.ORT_ENABLE_BASIC
    assert applied("cpu:optimization=disabled").graph_optimization_level == level.ORT_DISABLE_ALL


@pytest.mark.parametrize(
    ("text", "entry", "value"),
    [
        ("cpu:denormals=zero", "session.set_denormal_as_zero", "1"),
        ("cpu:denormals=keep", "session.set_denormal_as_zero", "0"),
        ("cpu:prepacking=off", "session.disable_prepacking", "1"),
        ("cpu:spinning=off", "session.intra_op.allow_spinning", "0"),
        ("cpu:spinning=off", "session.inter_op.allow_spinning", "0"),
        ("cpu:spinning=run", "session.force_spinning_stop", "1"),
        ("cpu:spinning=run", "session.intra_op.allow_spinning", "1"),
        ("cpu:spinning=True", "session.force_spinning_stop", "0"),
    ],
)
def test_session_entries_reach_onnxruntime(text, entry, value):
    assert applied(text).get_session_config_entry(entry) == value


@pytest.mark.usefixtures("_cuda")
def test_session_and_provider_options_are_distinguished():
    spec = parse_provider("GPU:use_tf32=0, threads=2,cudnn_conv_algo_search=HEURISTIC,spinning=OFF")
    assert spec.name == "CUDAExecutionProvider"
    assert dict(spec.session) == {"threads": "2", "spinning": "off"}
    assert dict(spec.options) == {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    assert str(spec) == "cuda:threads=2,spinning=off,use_tf32=0,cudnn_conv_algo_search=HEURISTIC"
    assert parse_provider(str(spec)) == spec


@pytest.mark.usefixtures("_cuda")
def test_values_may_hold_commas_and_colons():
    spec = parse_provider("cuda:device_type=HETERO:GPU,CPU,load_config=C:/a.json")
    assert dict(spec.options) == {"device_type": "HETERO:GPU,CPU", "load_config": "C:/a.json"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu:", "takes NAME:key=value"),
        ("cpu:threads", "takes NAME:key=value"),
        ("cpu:=2", "takes NAME:key=value"),
        ("cpu:threads=", "type threads=VALUE"),
        ("cpu:threads=2,threads=3", "threads is given twice"),
        ("cpu:threads=0", "threads takes a number of 1 or more, but got '0'"),
        ("cpu:threads=two", "got 'two'"),
        ("cpu:spinning=maybe", "spinning takes on, run, off, but got 'maybe'"),
        ("cpu:optimization=most", "all, layout, extended, basic, disabled"),
        ("cpu:thread=2", "'thread' does not exist; every provider takes threads, inter_threads, spinning"),
        ("cpu:use_tf32=0", "'use_tf32' does not exist"),
        ("teapot:a=1", "teapot"),
    ],
)
def test_what_cannot_be_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse_provider(text)


def test_every_session_option_has_a_value_it_takes_and_one_it_refuses():
    for key, option in SESSION_OPTIONS.items():
        for value in option.values or ("1", "2"):
            option.set_(onnxruntime.SessionOptions(), option.check(key, value))
        with pytest.raises(UsageError, match=key):
            option.check(key, "nonsense")


def test_a_spec_can_be_compared():
    assert parse_provider("cpu:threads=1") == parse_provider("CPU: threads=1") != parse_provider("cpu:threads=2")
    assert isinstance(parse_provider("cpu"), ProviderSpec)


def test_a_level_that_an_older_onnxruntime_has_not(monkeypatch):
    known = {name: level for name, level in vars(onnxruntime.GraphOptimizationLevel).items() if name.startswith("ORT_")}
    del known["ORT_ENABLE_LAYOUT"]
    monkeypatch.setattr(onnxruntime, "GraphOptimizationLevel", types.SimpleNamespace(**known))
    assert applied("cpu:optimization=extended").graph_optimization_level == known["ORT_ENABLE_EXTENDED"]
    with pytest.raises(UsageError, match=r"optimization=layout is not known to onnxruntime .*; use extended"):
        applied("cpu:optimization=layout")
