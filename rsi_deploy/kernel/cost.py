"""The cost model: what each route would take on this machine, from rates that are measured once and kept.

    flops of the direct route   4 q out in columns, and q bases
             Chebyshev          4 d out in columns, and d + 1 bases, for d = steps(q) iterations
             the Gram route     1.5 out in min + 4 out in columns + 2 (d - 1) min^2 columns, and d + 1 bases
             block Krylov       (2 d - 1) 2 out in columns + 2 out in d columns + 2 out in rank + 8 out (d columns)^2
             the exact route    2 out in min in float64, `eigh` of a square of that side, and 4 out in rank

A basis of a block `(m, columns)` is `4 m columns^2` flops in products, and `2/3 columns^3` in a Cholesky factor and an
inverse at about a quarter of their speed. All are of the shorter side but for one: the last of the direct route, and
one more of the others where the weight is tall.

Rates are measured in a second and kept in `$RSI_DEPLOY_CACHE` (else `$XDG_CACHE_HOME/rsi-deploy`), one file for the
processor, the version of torch and the number of threads. A file that cannot be read is measured again, one that cannot
be written is done without. So that a choice does not hang on noise, rates are rounded to powers of 1.25 and the
Chebyshev route is left only for one that should take less than `CLEARLY` of its time. The report names the route taken,
and a forced route gives the same bytes again.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from rsi_deploy.kernel.chebyshev import steps
from rsi_deploy.kernel.krylov import depth

Route = Literal["direct", "chebyshev", "gram", "krylov", "exact"]
ROUTES: tuple[Route, ...] = ("direct", "chebyshev", "gram", "krylov", "exact")
CLEARLY = 0.9
FASTER = 1.3  # bfloat16 is used where it multiplies so many times as fast as float32
log = logging.getLogger(__name__)
_told: dict[tuple[str, int], "Rates"] = {}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast this machine is.

    Attributes:
        full: float32 products, flops a second.
        half: bfloat16 products, flops a second.
        double: float64 products, flops a second.
        eigen: seconds of `eigh` in float64, over the cube of the side.
    """

    full: float
    half: float
    double: float
    eigen: float

    @property
    def mixed(self) -> bool:
        """Whether bfloat16 pays."""
        return self.half >= FASTER * self.full


def rates(device: torch.device) -> Rates:
    """The rates of this machine on `device`, measured where no file tells them; or those that were told."""
    threads = torch.get_num_threads()
    return _told.get((device.type, threads)) or _rates(device.type, threads)


def tell_rates(device: torch.device, rates: Rates) -> None:
    """Have this process choose as a machine with these rates would, with the number of threads that it has now."""
    _told[device.type, torch.get_num_threads()] = rates


def choose(
    rates: Rates,
    shape: tuple[int, int],
    columns: int,
    rank: int,
    q: int,
    *,
    mixed: bool,
    among: Sequence[Route] = ROUTES,
) -> Route:
    """The route that should take the least time for a weight `(out, in)`; Chebyshev unless it is clearly slower."""
    times = predicted(rates, shape, columns, rank, q, mixed=mixed)
    best = min((route for route in among if route in times), key=lambda route: times[route])
    return next(route for route in ("chebyshev", best) if CLEARLY * times[route] <= times[best])


def predicted(
    rates: Rates, shape: tuple[int, int], columns: int, rank: int, q: int, *, mixed: bool
) -> dict[Route, float]:
    """Seconds that each route should take; a route that cannot do it is left out."""
    out, in_ = shape
    small = min(out, in_)
    half = rates.half if mixed else rates.full
    product = 2.0 * out * in_ * columns
    last, basis = ((4.0 * side * columns**2 + 3.0 * columns**3) / rates.full + 2e-5 for side in (out, small))
    d = steps(q)
    bases = d * basis + (last if out > in_ else 0.0)
    times: dict[Route, float] = {
        "direct": (2 * q - 1) * product / half + product / rates.full + (q - 1) * basis + last,
        "chebyshev": (2 * d - 1) * product / half + product / rates.full + bases,
        "gram": (1.5 * out * in_ * small + 2 * product + 2.0 * (d - 1) * small**2 * columns) / rates.full + bases,
        "exact": 2.0 * out * in_ * small / rates.double + rates.eigen * small**3 + 2 * product / rates.full,
    }
    blocks = depth(q)
    if blocks * columns <= small // 2:
        wide = 8.0 * out * (blocks * columns) ** 2 / rates.full + rates.eigen * (blocks * columns) ** 3
        times["krylov"] = ((3 * blocks - 1) * product + 2.0 * out * in_ * rank) / rates.full + wide
    return times


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
        log.info("the machine's rates are not kept: %s", error)
    return measured


def _file(device: str, threads: int) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsi-deploy"
    root = Path(os.environ.get("RSI_DEPLOY_CACHE") or base)
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    key = hashlib.sha256(f"{name}\0{torch.__version__}\0{threads}\0{device}\0v1".encode()).hexdigest()[:16]
    return root / f"rates-{key}.json"


def processor() -> str:
    """The processor's name and features: equal names may differ in their instructions."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return "".join(sorted({line for line in text.splitlines() if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor()


def _measured(device: torch.device) -> Rates:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(1024, 1024, generator=generator).to(device)
    block = torch.randn(1024, 256, generator=generator).to(device)
    square = full[:256, :256].double()
    square = square @ square.mT
    half, half_block, double, double_block = full.bfloat16(), block.bfloat16(), full.double(), block.double()
    flops = 2.0 * 1024 * 1024 * 256
    best = _best(
        device, lambda: full @ block, lambda: half @ half_block, lambda: double @ double_block, lambda: _eigh(square)
    )
    return Rates(
        full=_rounded(flops / best[0]),
        half=_rounded(flops / best[1]),
        double=_rounded(flops / best[2]),
        eigen=_rounded(best[3] / 256**3),
    )


def _eigh(square: torch.Tensor) -> torch.Tensor:
    vectors: torch.Tensor = torch.linalg.eigh(square).eigenvectors
    return vectors


def _best(device: torch.device, *works: Callable[[], object], rounds: int = 7) -> list[float]:
    """The least seconds of each, in turns."""
    best = [math.inf] * len(works)
    for index in range(rounds + 1):
        for place, work in enumerate(works):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index:  # the first warms up
                best[place] = min(best[place], time.perf_counter() - started)
    return best


def _rounded(value: float) -> float:
    return 1.25 ** round(math.log(value, 1.25))
