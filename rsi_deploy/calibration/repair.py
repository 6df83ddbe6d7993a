"""Repair a rounded weight by a low-rank part, fitted to the response that rounding lost.

    W ~ Q + L R,   min |(W - Q - L R) X|^2:    L = leading left singular vectors of (W - Q) H^1/2,   R = L^T (W - Q)

Both factors are stored in eight bits. Where onnxruntime unpacks the weight when it loads the model, it adds the product
then, so that the repair takes bytes but no time.
"""

from dataclasses import dataclass

from torch import Tensor

from rsi_deploy.calibration.reduced_rank_regression import leading_left_vectors, regularized_cholesky, ridge_level
from rsi_deploy.calibration.rounding import DAMPING, Rounded, rounded_weight
from rsi_deploy.linalg.solver import Solver

SHARES = (0.04, 0.08, 0.15)
"""Bytes of a repair over those of the codes in four bits."""
LEAST_RANK = 2


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A low-rank part `left @ right`.

    Attributes:
        left: `(out, rank)`, in eight bits.
        right: `(rank, in)`, in eight bits.
    """

    left: Rounded
    right: Rounded

    @property
    def rank(self) -> int:
        """The rank."""
        return self.left.codes.shape[1]

    def product(self) -> Tensor:
        """Return `left @ right`, float32 `(out, in)`."""
        return self.left.weight() @ self.right.weight()


def repair_ranks(rows: int, columns: int) -> list[int]:
    """Return the ranks that are tried for a weight `(rows, columns)`."""
    ranks = {round(share * rows * columns / 2 / (rows + columns)) for share in SHARES}
    return sorted(rank for rank in ranks if LEAST_RANK <= rank <= min(rows, columns) // 4)


def repair_bytes(rank: int, rows: int, columns: int) -> int:
    """Return the bytes of a repair, with a scale for each row of its factors."""
    return rank * (rows + columns) + 4 * (rows + rank)


def repairs(
    weight: Tensor, near: Tensor, second: Tensor, ranks: list[int], solver: Solver, *, site: str = ""
) -> list[Repair]:
    """Return a repair of each rank.

    Args:
        weight: W `(out, in)`.
        near: its rounded numbers, `(out, in)`.
        second: second moments of the inputs E[x x^T] `(in, in)`.
        ranks: ranks of the repairs, rising.
        solver: computes the subspace of a weight with many rows.
        site: name of the site.
    """
    if not ranks:
        return []
    second = second.double()
    lost = weight.double() - near.double()
    level = ridge_level(second.diagonal()[None], DAMPING)
    root, _ = regularized_cholesky(second[None], level)
    left = leading_left_vectors(lost @ root, ranks[-1], solver, site=site)[0]
    right = left.mT @ lost
    return [
        Repair(
            left=rounded_weight(left[None, :, :rank].float(), None, is_product=True, bits=8),
            right=rounded_weight(right[None, :rank].float(), None, is_product=True, bits=8),
        )
        for rank in ranks
    ]
