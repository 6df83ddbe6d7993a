"""The smallest rank at which a weight's factors are good enough, for `--max-error`.

    5%     ||W - left right||_2 <= 0.05 ||W||_2         relative spectral error
    1.1x   ||W - left right||_2 <= 1.1 s_{rank+1}(W)    normalized error: near the best of that rank

A norm counts with the upper end of its certified interval, so what is promised holds (but for the failure probability);
`||W||_2` counts with its lower end. Ranks are tried from the least that any factors could have, in doubling steps, and
bisected: the answer meets the error and the rank below it does not. Errors fall with the rank but for the luck of the
sketch, so no smaller rank is expected to do.
"""

from collections.abc import Callable

from torch import Tensor

from rsi_deploy.core.sites import break_even_rank
from rsi_deploy.linalg.checks import checked
from rsi_deploy.linalg.solver import Factors, Solver, certified_norm, singular_values
from rsi_deploy.planning.planner import MaxError

EXACT_SPECTRUM = 2048  # up to this full rank the spectrum says where to begin


def smallest_rank(weight: Tensor, error: MaxError, solver: Solver, *, site: str = "") -> int | None:
    """The smallest rank that saves something and meets the error in every group; None where there is none.

    Args:
        weight: `(groups, out, in)` or `(out, in)`, floating.
        error: what is asked for.
        solver: computes the factors that are judged.
        site: the weight's name, for the random stream and messages.

    Raises:
        ValueError: a weight that cannot be factorized.
    """
    out_features, in_features = weight.shape[-2:]
    full = min(out_features, in_features)
    limit = break_even_rank(out_features, in_features)
    most = min(full, int(limit) - (int(limit) == limit))
    if most < 1:
        return None
    checked(weight, most, site)  # a spectrum of NaN would be torch's own error, of a matrix that is none of the user's
    values = singular_values(weight) if full <= EXACT_SPECTRUM or error.normalized else None
    begin = _least(values, error) if values is not None and not error.normalized else 1
    norm = certified_norm(weight, Factors(weight[..., :0], weight[..., :0, :])).lower

    def meets(rank: int) -> bool:
        upper = certified_norm(weight, solver(weight, rank, site=site)).upper
        allowed = values[..., rank] if values is not None and error.normalized else norm
        return bool((upper <= error.value * allowed).all())

    return _searched(meets, min(begin, most), most) if begin <= most else None


def _least(values: Tensor, error: MaxError) -> int:
    """The rank below which not even the best factors meet the relative error."""
    return max(int((values > error.value * values[..., :1]).sum(-1).max()), 1)


def _searched(meets: Callable[[int], bool], begin: int, most: int) -> int | None:
    """The smallest rank from `begin` to `most` that meets, where all above one that does do too; None without any."""
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
