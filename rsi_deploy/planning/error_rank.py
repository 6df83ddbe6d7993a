"""Find the smallest rank whose factors meet `--max-error`.

    5%     ||W - left right||_2 <= 0.05 ||W||_2         relative spectral error
    1.1x   ||W - left right||_2 <= 1.1 s_{rank+1}(W)    normalized error: close to the best factors of that rank

The error is the upper end of its certified interval and `||W||_2` the lower end, so the bound holds up to the failure
probability. Ranks are tried in doubling steps from the smallest that the spectrum allows, then bisected: the result
meets the error and the rank below it does not. Errors decrease with the rank up to the randomness of the sketch, so
no smaller rank is expected to meet the error.
"""

from collections.abc import Callable

from torch import Tensor

from rsi_deploy.core.sites import break_even_rank
from rsi_deploy.linalg.checks import check_weight
from rsi_deploy.linalg.solver import Factors, Solver, certified_norm, singular_values
from rsi_deploy.planning.planner import MaxError

EXACT_SPECTRUM = 2048  # largest full rank for which the exact spectrum gives the first rank to try


def smallest_rank(weight: Tensor, error: MaxError, solver: Solver, *, site: str = "") -> int | None:
    """Return the smallest rank below break-even that meets the error in every group, or None.

    Args:
        weight: `(groups, out, in)` or `(out, in)`, floating.
        error: error bound.
        solver: solver that computes the factors.
        site: name of the weight, for the random stream and for messages.

    Raises:
        ValueError: a weight that cannot be factorized.
    """
    out_features, in_features = weight.shape[-2:]
    full = min(out_features, in_features)
    limit = break_even_rank(out_features, in_features)
    most = min(full, int(limit) - (int(limit) == limit))
    if most < 1:
        return None
    check_weight(weight, most, site)  # names the site, unlike torch's error for the spectrum of NaN
    values = singular_values(weight) if full <= EXACT_SPECTRUM or error.normalized else None
    begin = _least(values, error) if values is not None and not error.normalized else 1
    norm = certified_norm(weight, Factors(weight[..., :0], weight[..., :0, :])).lower

    def meets(rank: int) -> bool:
        upper = certified_norm(weight, solver(weight, rank, site=site)).upper
        allowed = values[..., rank] if values is not None and error.normalized else norm
        return bool((upper <= error.value * allowed).all())

    return _first_rank(meets, begin, most) if begin <= most else None


def _least(values: Tensor, error: MaxError) -> int:
    """Return the smallest rank whose best factors meet the relative error."""
    return max(int((values > error.value * values[..., :1]).sum(-1).max()), 1)


def _first_rank(meets: Callable[[int], bool], begin: int, most: int) -> int | None:
    """Return the smallest rank from `begin` to `most` for which the monotone `meets` is true, or None."""
    below, rank, step = begin - 1, begin, 1
    while not meets(rank):
        if rank == most:
            return None
        below, rank, step = rank, min(rank + step, most), 2 * step
    while rank - below > 1:
        middle = (rank + below) // 2
        if meets(middle):
            rank = middle
        else:
            below = middle
    return rank
