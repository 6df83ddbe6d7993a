"""Choose the hidden units that a product keeps, and refit its weight to them, by its response on calibration data.

    y = W x, the columns of a unit are neighbours; s the kept columns, d the others

    W_s + W_d xx_ds (xx_ss)^-1                  the best weight for the kept columns
    |W_b (H_bb)^-1/2|^2,  H = (xx + r I)^-1     what removing unit b alone adds to the error E|y - W' x|^2

Units are removed a few at a time, those that add least first, and the weight is refitted after each step: steps of
block Gaussian elimination on H (Hassibi and Stork 1993, for single weights). With an output sensitivity `S S^T` errors
are those of `S^T y`. Fewer units are a part of more, so one elimination gives the weights for all numbers of units.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.reduced_rank_regression import regularized_cholesky, ridge_level, sensitivity_root

STEPS, LARGE_STEPS = 64, 24
"""One of so many units that are left goes at a time; the second where more than 512 inputs are left."""
_LARGE = 512
MOST_OPTIONS = 16
"""Largest number of unit counts that are tried for a site."""


def unit_counts(count: int, multiple: int = 1) -> list[int]:
    """Return the numbers of units that are tried, multiples of a power of two that suits kernels, from the largest on.

    Examples:
        >>> unit_counts(16), unit_counts(1536)[:3], unit_counts(1536)[-1]
        ([15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1], [1440, 1344, 1248], 96)
    """
    step = 1
    while step < 16 and count >= 32 * step:
        step *= 2
    step = step * multiple if step % multiple else step
    steps = -(-count // (step * MOST_OPTIONS)) * step
    return list(range((count - 1) // steps * steps, 0, -steps))


def eliminated(
    weight: Tensor, xx: Tensor, count: int, kept: Sequence[int], *, ridge: float, sensitivity: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield units and weight for each number of kept units, from the largest on.

    Args:
        weight: W `(out, columns)`.
        xx: centred second moments of the input, `(columns, columns)`.
        count: number of units.
        kept: numbers of units to keep, each from 1 to `count`, in falling order.
        ridge: ridge in mean input variances.
        sensitivity: output sensitivity `(out, out)`; None for the identity.

    Yields:
        The kept units in ascending order, int64 `(kept,)`, and the refitted weight `(out, columns)` in the dtype of
        `xx`, which is zero in the columns of the others.
    """
    run = weight.shape[-1] // count
    root = None if sensitivity is None else sensitivity_root(sensitivity).to(xx.dtype)
    V = weight.to(xx.dtype) if root is None else root.mT @ weight.to(xx.dtype)
    level = ridge_level(xx.diagonal()[None], ridge)
    H = torch.cholesky_inverse(regularized_cholesky(xx[None], level)[0][0])
    left = torch.arange(count, device=xx.device)
    columns = torch.arange(run, device=xx.device)
    for size in kept:
        while len(left) > size:
            steps = STEPS if len(H) <= _LARGE else LARGE_STEPS
            number = min(max(1, len(left) // steps), len(left) - size)
            cheapest = _added_errors(V, H, len(left)).argsort(stable=True)
            gone, stay = cheapest[:number], cheapest[number:].sort().values
            d, s = ((units[:, None] * run + columns).reshape(-1) for units in (gone, stay))
            solved = torch.linalg.solve(H[d][:, d], H[d][:, s])
            V, H = V[:, s] - V[:, d] @ solved, H[s][:, s] - H[s][:, d] @ solved
            H = (H + H.mT) / 2
            left = left[stay]
        whole = V.new_zeros(weight.shape)
        kept_columns = (left[:, None] * run + columns).reshape(-1)
        whole[:, kept_columns] = V if root is None else torch.linalg.solve_triangular(root.mT, V, upper=True)
        yield left, whole


def unit_factors(units: Tensor, weight: Tensor, count: int, points: int) -> tuple[Tensor, Tensor]:
    """Return the factors of the form "units": `left (1, out * points, rank)` and `right (1, rank, columns / points)`.

    Args:
        units: numbers of the kept units.
        weight: refitted weight `(out, columns)`.
        count: number of units.
        points: points of the kernel, which the second node has.
    """
    rows, inputs = len(weight), weight.shape[-1] // points
    run = inputs // count
    places = (units[:, None] * run + torch.arange(run, device=units.device)).reshape(-1)
    left = weight.reshape(rows, inputs, points)[:, places].mT.reshape(1, rows * points, len(places))
    return left, torch.eye(inputs, dtype=weight.dtype, device=weight.device)[places][None]


def unit_readers(sites: Sequence[CalibratedSite]) -> dict[str, tuple[str, ...]]:
    """Return site -> the sites that make its hidden units, for sites that may have the form "units" at the same time.

    A chain of sites would have each of them in two pairs; the pairs with the most numbers are taken.
    """
    names = {site.name for site in sites}

    def numbers(site: CalibratedSite) -> int:
        assert site.units is not None
        return site.units.count * site.units.numbers + site.out_features * site.in_features

    found: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for site in sorted((site for site in sites if site.units is not None), key=numbers, reverse=True):
        assert site.units is not None
        together = {site.name, *site.units.makers}
        if together <= names and not together & taken and len(together) == 1 + len(site.units.makers):
            found[site.name] = site.units.makers
            taken |= together
    return found


def _added_errors(V: Tensor, H: Tensor, count: int) -> Tensor:
    """Return what removing each unit alone adds to the error of `V x`, `(count,)`."""
    run = V.shape[-1] // count
    if run == 1:
        return V.square().sum(dim=0) / H.diagonal()
    blocks = H.reshape(count, run, count, run).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    parts = V.reshape(len(V), count, run).movedim(1, 0)  # (count, out, run)
    added: Tensor = (torch.linalg.solve(blocks, parts.mT) * parts.mT).sum(dim=(-2, -1))
    return added
