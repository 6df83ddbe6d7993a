import subprocess
import sys
import types

import onnxruntime
import pytest

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime import providers


@pytest.fixture(autouse=True)
def _fresh_plugins():
    providers.register_plugins.cache_clear()
    yield
    providers.register_plugins.cache_clear()


@pytest.fixture
def plugin(monkeypatch):
    """Installs a module `onnxruntime_ep_<name>` as a plug-in package would, and notes what gets registered."""
    registered = {}
    names = []

    def install(name, get_library_path):
        module = types.ModuleType(f"onnxruntime_ep_{name}")
        module.get_library_path = get_library_path
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names.append(types.SimpleNamespace(name=module.__name__))

    monkeypatch.setattr(providers.pkgutil, "iter_modules", lambda: names)
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda name, path: registered.update({name: path})
    )
    install.registered = registered
    return install


class Device:
    ep_name = "OpenVINOExecutionProvider"


def test_the_modules_load_neither_torch_nor_onnxruntime():
    runtime = ("feeds.inputs", "machine", "providers", "provider_spec", "sessions", "placement", "binding")
    names = ["evaluation.accuracy", "data.sources", "data.preprocess", "benchmark.latency", "benchmark.mlperf.loadgen"]
    names += [f"runtime.{name}" for name in runtime]
    code = "import sys\n" + "\n".join(f"import rsi_deploy.{name}" for name in names)
    code += "\nprint({'torch', 'torchvision', 'onnxruntime', 'onnx', 'mlperf_loadgen'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["cpu", "CPU", " Cpu ", "CPUExecutionProvider", "cpuexecutionprovider", "cpu:a=b"])
def test_any_spelling_of_cpu(name):
    assert providers.resolve_provider(name) == "CPUExecutionProvider"


def test_plug_in_providers_are_found(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [Device(), Device()], raising=False)
    assert providers.available_providers().count("OpenVINOExecutionProvider") == 1
    assert providers.resolve_provider("openvino") == "OpenVINOExecutionProvider"
    assert len(providers.plugin_devices("OpenVINOExecutionProvider")) == 2
    assert providers.plugin_devices("OtherExecutionProvider") == []


def test_installed_plug_ins_are_registered_once_and_only_when_needed(plugin):
    plugin("teapot", lambda: "libteapot.so")
    providers.resolve_provider("cpu")
    assert plugin.registered == {}
    providers.available_providers()
    assert plugin.registered == {"rsi-deploy.onnxruntime_ep_teapot": "libteapot.so"}
    plugin.registered.clear()
    providers.available_providers()
    assert plugin.registered == {}


def test_a_plug_in_without_a_device_is_reported(plugin):
    plugin("teapot", lambda: "libteapot.so")
    with pytest.raises(UsageError, match="onnxruntime-ep-teapot is installed and loads, but finds no device"):
        providers.resolve_provider("teapot")


def test_a_broken_plug_in_is_reported_and_does_not_affect_others(plugin):
    def broken():
        raise FileNotFoundError("no libteapot.so")

    plugin("teapot", broken)
    plugin("urn", lambda: "liburn.so")
    assert providers.resolve_provider("cpu") == "CPUExecutionProvider"
    with pytest.raises(UsageError, match=r"onnxruntime-ep-teapot .* cannot be loaded: no libteapot\.so"):
        providers.resolve_provider("teapot")
    assert list(plugin.registered) == ["rsi-deploy.onnxruntime_ep_urn"]


def test_a_library_that_onnxruntime_refuses_is_reported(plugin, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(providers.pkgutil, "iter_modules", lambda: [types.SimpleNamespace(name="onnxruntime_ep_none")])
    module = types.ModuleType("onnxruntime_ep_none")
    module.get_library_path = lambda: "no_such_library.so"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "no_such_library.so" in providers.register_plugins()["onnxruntime_ep_none"]


def test_an_old_onnxruntime_without_plug_ins(monkeypatch):
    monkeypatch.delattr(onnxruntime, "get_ep_devices", raising=False)
    assert "CPUExecutionProvider" in providers.available_providers()


def test_an_absent_provider_says_what_there_is_and_what_to_install(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    for name in ("gpu", "cuda:use_tf32=0", "trt"):
        with pytest.raises(UsageError) as caught:
            providers.resolve_provider(name)
        for part in (repr(name), "available: cpu", "pip uninstall onnxruntime && pip install onnxruntime-gpu"):
            assert part in str(caught.value)
    with pytest.raises(UsageError, match="onnxruntime-teapot"):
        providers.resolve_provider("teapot")


def test_two_onnxruntime_distributions_are_reported(monkeypatch):
    both = {"onnxruntime": "1.0", "onnxruntime-gpu": "1.0"}
    monkeypatch.setattr(providers, "onnxruntime_distributions", lambda: both)
    with pytest.raises(UsageError, match="overwrite each other"):
        providers.resolve_provider("teapot")
    monkeypatch.setattr(providers, "onnxruntime_distributions", lambda: {"onnxruntime": "1.0"})
    with pytest.raises(UsageError) as caught:
        providers.resolve_provider("teapot")
    assert "overwrite" not in str(caught.value)
