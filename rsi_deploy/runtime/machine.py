"""The machine and the package versions of a measurement, stored with every result.

Nothing heavy is imported: versions come from the installed packages, and GPU names from torch only if it is loaded
already, else from `nvidia-smi`.
"""

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from pydantic import BaseModel

PACKAGES = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy", "onnxruntime-genai")

_APART = ("onnxruntime-ep-", "onnxruntime-extensions", "onnxruntime-genai")

# Instruction sets that decide which kernels run, in Linux's spelling (x86, then ARM).
_FLAGS = ("avx2", "fma", "avx_vnni", "neon", "asimd", "asimddp", "asimdhp", "sve", "sve2", "i8mm", "bf16")
_FLAG_PREFIXES = ("avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_")


class Environment(BaseModel, frozen=True, extra="forbid"):
    """The conditions of a timing besides the model.

    Attributes:
        python: version and implementation.
        platform: operating system and architecture.
        cpu: processor name, or the architecture if the name is unknown.
        cores: logical cores that this process may use, within the limits of a container or taskset.
        physical_cores: physical cores of the machine; None if unknown.
        memory_bytes: memory of the machine.
        cpu_flags: instruction sets that matter for matrix products.
        gpus: names of the GPUs; empty if there are none, or if torch is not loaded and `nvidia-smi` is missing.
        versions: package -> version of installed packages, including every onnxruntime distribution.
        affinity: logical cores that this process may use; () if unknown.
        governor: frequency governor of the cores ("performance", "schedutil"...); None if unknown.
        clock_mhz: current clock of the fastest core, and its maximum; None if unknown.
        torch_threads: threads of torch; None if it is not loaded. Exact factors and factors fitted to data may differ
            in their last bits with another number, because sums are computed in another order.
        load_average: average number of runnable processes over 1, 5 and 15 minutes; above `cores`, timings are noisy.
    """

    python: str
    platform: str
    cpu: str
    cores: int
    physical_cores: int | None
    memory_bytes: int
    cpu_flags: tuple[str, ...]
    gpus: tuple[str, ...]
    versions: dict[str, str]
    load_average: tuple[float, float, float] | None
    affinity: tuple[int, ...] = ()
    governor: str | None = None
    clock_mhz: tuple[float, float | None] | None = None
    torch_threads: int | None = None


def environment() -> Environment:
    """Describe this machine now."""
    name, flags = parse_cpuinfo(_cpuinfo())
    return Environment(
        python=f"{platform.python_version()} {platform.python_implementation()}",
        platform=platform.platform(),
        cpu=name or platform.processor() or platform.machine(),
        cores=len(affinity()) or os.cpu_count() or 1,
        physical_cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        cpu_flags=relevant_flags(flags),
        gpus=_gpus(),
        versions=_versions(),
        load_average=load_average(),
        affinity=affinity(),
        governor=_governor(),
        clock_mhz=_clock(),
        torch_threads=_torch_threads(),
    )


def load_average() -> tuple[float, float, float] | None:
    """Return the average number of runnable processes over 1, 5 and 15 minutes; None if unknown."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def onnxruntime_distributions() -> dict[str, str]:
    """Return the installed distributions of onnxruntime and their versions.

    `onnxruntime`, `onnxruntime-gpu`, `onnxruntime-openvino`... all install the folder `onnxruntime` and overwrite each
    other; plug-ins (`onnxruntime-ep-*`), extensions and onnxruntime-genai do not, and are left out.
    """
    return dict(_onnxruntime_distributions())


@functools.cache
def _onnxruntime_distributions() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():  # reads every package's metadata: 0.1 s
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("onnxruntime") and not name.startswith(_APART):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def parse_cpuinfo(text: str) -> tuple[str | None, frozenset[str]]:
    r"""Return the first processor's name and flags from the text of /proc/cpuinfo.

    >>> name, flags = parse_cpuinfo("model name : Some CPU\nflags : fpu avx2")
    >>> name, sorted(flags)
    ('Some CPU', ['avx2', 'fpu'])
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""  # x86 / ARM
    return fields.get("model name") or fields.get("hardware") or None, frozenset(flags.split())


def relevant_flags(flags: frozenset[str]) -> tuple[str, ...]:
    """Return the flags that decide which matrix kernels run, sorted.

    >>> relevant_flags(frozenset({"fpu", "avx2", "amx_bf16"}))
    ('amx_bf16', 'avx2')
    """
    return tuple(sorted(flag for flag in flags if flag in _FLAGS or flag.startswith(_FLAG_PREFIXES)))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _governor() -> str | None:
    """Return the governor of the first core on Linux; virtual machines have none."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _clock() -> tuple[float, float | None] | None:
    """Return the current and the maximal clock in MHz."""
    try:
        cores = psutil.cpu_freq(percpu=True)
    except (AttributeError, NotImplementedError, OSError):  # not supported, or not readable
        return None
    if not cores:
        return None
    fastest = max(cores, key=lambda core: core.current)
    return round(fastest.current, 1), fastest.max or None


def affinity() -> tuple[int, ...]:
    """Return the logical cores that this process may use, ascending; () if unknown."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch is not None and hasattr(torch, "get_num_threads") else None


def _gpus() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.splitlines() if line.strip())


def _versions() -> dict[str, str]:
    versions = {package: _version(package) for package in PACKAGES}
    return {package: version for package, version in versions.items() if version} | onnxruntime_distributions()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory(process: int | None = None) -> int:
    """Return the largest resident set of this process, or on Linux of another, in bytes; 0 if unknown.

    On Linux a child process inherits `ru_maxrss` from its parent, so VmHWM is read instead.
    """
    try:
        status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if process is not None:
        return 0
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in kB


def resident_memory() -> int:
    """Return the resident set of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Return the available memory of the system in bytes."""
    return int(psutil.virtual_memory().available)
