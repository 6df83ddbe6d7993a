"""The cost model: the time that each route should take on this machine, from its rates (`products.rates`).

    flops of the direct route   4 q out in columns, and q bases
             Chebyshev          4 d out in columns, and d + 1 bases, for d = steps(q) iterations
             the Gram route     1.5 out in min + 4 out in columns + 2 (d - 1) min^2 columns, and d + 1 bases
             block Krylov       (2 d - 1) 2 out in columns + 2 out in d columns + 2 out in rank + 8 out (d columns)^2
             the exact route    2 out in min in float64, `eigh` of a square of that side, and 4 out in rank

A basis of a block `(m, columns)` takes `4 m columns^2` flops in products, and `2/3 columns^3` in a Cholesky factor and
an inverse at about a quarter of their speed. All bases are of the shorter side except two: the last of the direct
route, and one more of the others if the weight is tall.

To be robust to noise, another route replaces Chebyshev only if it should take less than `CLEARLY` of its time. The
report names the route, and forcing that route gives the same bytes again.
"""

from collections.abc import Sequence
from typing import Literal

from rsi_deploy.linalg.products.rates import Rates
from rsi_deploy.linalg.routes.chebyshev import steps
from rsi_deploy.linalg.routes.krylov import depth

Route = Literal["direct", "chebyshev", "gram", "krylov", "exact"]
ROUTES: tuple[Route, ...] = ("direct", "chebyshev", "gram", "krylov", "exact")
CLEARLY = 0.9


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
    """Return the fastest route for a weight `(out, in)`; Chebyshev unless it is clearly slower."""
    times = predicted(rates, shape, columns, rank, q, mixed=mixed)
    best = min((route for route in among if route in times), key=lambda route: times[route])
    return next(route for route in ("chebyshev", best) if CLEARLY * times[route] <= times[best])


def predicted(
    rates: Rates, shape: tuple[int, int], columns: int, rank: int, q: int, *, mixed: bool
) -> dict[Route, float]:
    """Predict the seconds of each route; routes that are not possible are left out."""
    out, in_ = shape
    small = min(out, in_)
    half = rates.half if mixed else rates.single
    product = 2.0 * out * in_ * columns
    last, basis = ((4.0 * side * columns**2 + 3.0 * columns**3) / rates.single + 2e-5 for side in (out, small))
    d = steps(q)
    bases = d * basis + (last if out > in_ else 0.0)
    times: dict[Route, float] = {
        "direct": (2 * q - 1) * product / half + product / rates.single + (q - 1) * basis + last,
        "chebyshev": (2 * d - 1) * product / half + product / rates.single + bases,
        "gram": (1.5 * out * in_ * small + 2 * product + 2.0 * (d - 1) * small**2 * columns) / rates.single + bases,
        "exact": 2.0 * out * in_ * small / rates.double + rates.eigen * small**3 + 2 * product / rates.single,
    }
    blocks = depth(q)
    if blocks * columns <= small // 2:
        wide = 8.0 * out * (blocks * columns) ** 2 / rates.single + rates.eigen * (blocks * columns) ** 3
        times["krylov"] = ((3 * blocks - 1) * product + 2.0 * out * in_ * rank) / rates.single + wide
    return times
