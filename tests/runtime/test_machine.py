import importlib.metadata
import sys

import pytest
from pydantic import ValidationError

from rsi_deploy.runtime import machine

X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile sse\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve bf16 evtstrm\n"


def test_cpuinfo_of_two_architectures():
    name, flags = machine.parse_cpuinfo(X86)
    assert name == "Some CPU"
    assert machine.relevant_flags(flags) == ("amx_tile", "avx2", "avx512_bf16", "avx512f")
    name, flags = machine.parse_cpuinfo(ARM)
    assert name is None
    assert machine.relevant_flags(flags) == ("asimd", "bf16", "sve")
    assert machine.parse_cpuinfo("") == (None, frozenset())


def test_this_machine():
    found = machine.environment()
    assert found.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert found.cpu
    for package in ("numpy", "onnx", "torch"):
        assert found.versions[package] == importlib.metadata.version(package)
    assert any(name.startswith("onnxruntime") for name in found.versions)
    assert machine.Environment.model_validate_json(found.model_dump_json()) == found
    with pytest.raises(ValidationError):
        found.cpu = "another"


def test_absent_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package-here"))
    assert "no-such-package-here" not in machine.environment().versions


def test_every_onnxruntime_distribution_is_listed_and_no_plug_in(monkeypatch):
    class Distribution:
        version = "1.2"

        def __init__(self, name):
            self.metadata = {"Name": name}

    names = ["numpy", "onnxruntime_gpu", "onnxruntime", "onnxruntime-ep-openvino", "onnxruntime-extensions"]
    names.append("onnxruntime-genai")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: map(Distribution, names))
    monkeypatch.setattr(machine, "_onnxruntime_distributions", machine._onnxruntime_distributions.__wrapped__)
    assert list(machine.onnxruntime_distributions()) == ["onnxruntime", "onnxruntime-gpu"]


def test_gpu_names_come_from_torch_only_when_it_is_loaded(monkeypatch):
    class Cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)
        get_device_name = staticmethod(lambda index: f"GPU {index}")

    class Torch:
        cuda = Cuda

    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert machine.environment().gpus == ("GPU 0", "GPU 1")
    monkeypatch.delitem(sys.modules, "torch")
    assert machine.environment().gpus == ()


def test_gpu_names_from_nvidia_smi(monkeypatch, tmp_path):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    command.chmod(0o755)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: str(command))
    assert machine.environment().gpus == ("NVIDIA H200",)
    command.write_text("#!/bin/sh\nexit 9\n")
    assert machine.environment().gpus == ()
