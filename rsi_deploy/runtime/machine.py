"""The machine and the versions a measurement was made with: stored beside every result.

Nothing heavy is imported for it: versions are read from the installed packages, GPU names from torch only
where torch is loaded already, else from `nvidia-smi`.
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

PACKAGES = ("torch", "torchvision", "onnx", "onnx-ir", "onnxscript", "numpy")

# Instruction sets that decide which kernels run, as Linux spells them (x86, then ARM).
_FLAGS = ("avx2", "fma", "avx_vnni", "neon", "asimd", "asimddp", "asimdhp", "sve", "sve2", "i8mm", "bf16")
_FLAG_PREFIXES = ("avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_")


class Environment(BaseModel, frozen=True, extra="forbid"):
    """What a timing depends on besides the model.

    Attributes:
        python: version and implementation.
        platform: operating system and architecture.
        cpu: the processor's own name, or the architecture where it tells none.
        cores: logical cores this process may use (a container's or taskset's share).
        physical_cores: of the whole machine; None where the system does not tell.
        memory_bytes: of the whole machine.
        cpu_flags: the instruction sets among them that matter for matrix products.
        gpus: names; empty where neither torch is loaded nor `nvidia-smi` found, or there are none.
        versions: package -> version; absent packages are left out; every onnxruntime distribution is listed.
        affinity: logical cores this process may use; () where the system does not tell.
        governor: what decides the cores' clocks ("performance", "schedutil"...); None where it is not readable.
        clock_mhz: of the core that is fastest now, and the most it may have; None where not readable.
        torch_threads: that torch computes with; None where it is not loaded. Exact factors and those fitted to data are
            summed in another order with another number, and may differ in their last bits.
        load_average: processes wanting a core over 1, 5 and 15 minutes; timings are noisy above `cores`.
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
        cores=_usable_cores(),
        physical_cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        cpu_flags=relevant_flags(flags),
        gpus=_gpus(),
        versions=_versions(),
        load_average=load_average(),
        affinity=tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else (),
        governor=_governor(),
        clock_mhz=_clock(),
        torch_threads=_torch_threads(),
    )


def load_average() -> tuple[float, float, float] | None:
    """Processes wanting a core over 1, 5 and 15 minutes; None where the system does not tell."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def onnxruntime_distributions() -> dict[str, str]:
    """Installed distributions of onnxruntime -> version; more than one have overwritten each other's files.

    `onnxruntime`, `onnxruntime-gpu`, `onnxruntime-openvino`... all install the folder `onnxruntime`; plug-ins
    (`onnxruntime-ep-*`) and extensions do not, and are left out.
    """
    return dict(_onnxruntime_distributions())


@functools.cache
def _onnxruntime_distributions() -> dict[str, str]:
    found = {}
    for distribution in importlib.metadata.distributions():  # reads every package's metadata: 0.1 s
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("onnxruntime") and not name.startswith(("onnxruntime-ep-", "onnxruntime-extensions")):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def parse_cpuinfo(text: str) -> tuple[str | None, frozenset[str]]:
    r"""The first processor's name and flags in the text of /proc/cpuinfo.

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
    """Those that decide which matrix kernels run, sorted.

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
    """Of the first core, as Linux says it; virtual machines have none."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _clock() -> tuple[float, float | None] | None:
    """MHz now and at most."""
    try:
        cores = psutil.cpu_freq(percpu=True)
    except (AttributeError, NotImplementedError, OSError):  # not on this platform, or not readable
        return None
    if not cores:
        return None
    fastest = max(cores, key=lambda core: core.current)
    return round(fastest.current, 1), fastest.max or None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    """Largest resident set so far of this process, or on Linux of another, bytes (0 where the system does not tell).

    Linux hands `ru_maxrss` on from parent to child, so that a small process has its parent's: VmHWM is its own.
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
    """Resident set of this process now, bytes."""
    return int(psutil.Process().memory_info().rss)


def free_memory() -> int:
    """Bytes of memory that the system could give out now."""
    return int(psutil.virtual_memory().available)
