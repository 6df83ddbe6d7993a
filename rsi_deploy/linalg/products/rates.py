"""The speed of this machine's products: measured once, in two seconds, and cached.

Rates are stored in the cache folder (`core.cache_folder`), one file per processor, version of torch and number of
threads. A file that cannot be read is measured again; one that cannot be written is ignored. Rates are rounded to
powers of 1.25, so that choices are robust to noise.
"""

import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rsi_deploy.core.cache_folder import cache_folder
from rsi_deploy.linalg.products.onednn import by_onednn, has_onednn

FASTER = 1.2  # bfloat16 is used if it is this many times as fast as float32
CLEAR = 1.2  # oneDNN is used for float32 if it is this many times as fast as `@`
ROUNDS, SECONDS = 7, 1.5
SIDE, COLUMNS = 2048, 205  # odd like ranks, as even numbers favour some libraries
SIDE_GPU, COLUMNS_GPU = 8192, 1025  # smaller products do not occupy a GPU fully
log = logging.getLogger(__name__)
_set_rates: dict[tuple[str, int], "Rates"] = {}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The speed of this machine.

    Attributes:
        full: float32 products by `@`, flops per second.
        onednn: float32 products by oneDNN (`products.onednn`), flops per second; nearly 0 if it is not available.
        half: bfloat16 products, flops per second.
        double: float64 products, flops per second.
        eigen: seconds of `eigh` in float64, divided by the cube of the side.
    """

    full: float
    onednn: float
    half: float
    double: float
    eigen: float

    @property
    def mixed(self) -> bool:
        """Return whether bfloat16 is clearly faster."""
        return self.half >= FASTER * self.single

    @property
    def by_onednn(self) -> bool:
        """Return whether oneDNN is clearly faster than `@` for float32."""
        return self.onednn >= CLEAR * self.full

    @property
    def single(self) -> float:
        """Speed of float32 products by the faster of the two."""
        return self.onednn if self.by_onednn else self.full


def rates(device: torch.device) -> Rates:
    """Return the rates of `device`: those set by `set_rates`, cached ones, or measured ones."""
    threads = torch.get_num_threads()
    return _set_rates.get((device.type, threads)) or _rates(device.type, threads)


def set_rates(device: torch.device, rates: Rates) -> None:
    """Make this process choose as on a machine with these rates, for its current number of threads."""
    _set_rates[device.type, torch.get_num_threads()] = rates


@functools.cache
def _rates(device: str, threads: int) -> Rates:
    path = _file(device, threads)
    try:
        known = Rates(**json.loads(path.read_text(encoding="utf-8")))
        if all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in asdict(known).values()):
            return known
    except (OSError, ValueError, TypeError):
        pass
    measured = _measured(torch.device(device))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
            work = Path(folder) / path.name
            work.write_text(json.dumps(asdict(measured)), encoding="utf-8")
            os.replace(work, path)
    except OSError as error:
        log.info("the machine's rates cannot be cached: %s", error)
    return measured


def _file(device: str, threads: int) -> Path:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    key = hashlib.sha256(f"{name}\0{torch.__version__}\0{threads}\0{device}\0v5".encode()).hexdigest()[:16]
    return cache_folder() / f"rates-{key}.json"


def processor() -> str:
    """Return the processor's name and features, as equal names may differ in their instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return "".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor()


def _measured(device: torch.device) -> Rates:
    side, columns = (SIDE_GPU, COLUMNS_GPU) if device.type == "cuda" else (SIDE, COLUMNS)
    generator = torch.Generator(device).manual_seed(0)
    full = torch.randn(side, side, generator=generator, device=device)
    block = torch.randn(side, columns, generator=generator, device=device)
    square = full[:256, :256].double()
    square = square @ square.mT
    half, half_block = full.bfloat16(), block.bfloat16()
    double, double_block = full[: side // 2, : side // 2].double(), block[: side // 2].double()
    flops = 2.0 * side * side * columns
    if device.type == "cuda":  # as in `gemm.product`
        block, half_block = block.mT.contiguous(), half_block.mT.contiguous()
        full, half = full.mT, half.mT
        works: list[Callable[[], object]] = [lambda: block @ full, lambda: half_block @ half]
    else:
        works = [lambda: full @ block, lambda: half @ half_block]
    works += [
        lambda: double @ double_block,
        lambda: _eigh(square),
    ]
    if has_onednn(device):
        works.append(lambda: by_onednn(full, block))
    best = _best(device, *works)
    return Rates(
        full=_rounded(flops / best[0]),
        onednn=_rounded(flops / best[4]) if len(best) > 4 else 1.0,
        half=_rounded(flops / best[1]),
        double=_rounded(flops / 4 / best[2]),
        eigen=_rounded(best[3] / 256**3),
    )


def _eigh(square: torch.Tensor) -> torch.Tensor:
    vectors: torch.Tensor = torch.linalg.eigh(square).eigenvectors
    return vectors


def _best(device: torch.device, *works: Callable[[], object]) -> list[float]:
    """Return the least seconds of each function, run in turns for long enough to average out other load."""
    best = [math.inf] * len(works)
    begun, index = time.perf_counter(), 0
    while index <= ROUNDS or time.perf_counter() - begun < SECONDS:
        for place, work in enumerate(works):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index:  # the first warms up
                best[place] = min(best[place], time.perf_counter() - started)
        index += 1
    return best


def _rounded(value: float) -> float:
    return 1.25 ** round(math.log(value, 1.25))
