"""A spectrum in few numbers: enough to draw, little enough to keep for every site.

ranks    1 = i_1 < i_2 < ... , evenly spaced in their logarithm, the chosen one and the last known among them
values   s_i / s_1 at those ranks
"""

from typing import Literal, Self

import numpy as np
import pydantic
from torch import Tensor

POINTS = 24
"""At most so many are kept: about 0.6 kB a site in report.json."""


class Spectrum(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Singular values at some ranks, relative to the largest.

    Attributes:
        of: "weight", or "response": of the matrix whose leading directions factors fitted to data keep.
        ranks: ascending, from 1. The last is the full rank, or where only the leading values were computed the last.
        values: `s_i / s_1`, four digits; over groups their root mean square.
        full_rank: `min(out, in)` of the matrix they are of.
    """

    of: Literal["weight", "response"]
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    full_rank: int

    @pydantic.model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.ranks) != len(self.values):
            raise ValueError(f"ranks and values must be as many, but are {len(self.ranks)} and {len(self.values)}")
        return self


def thinned(values: Tensor, full_rank: int, rank: int, of: Literal["weight", "response"] = "weight") -> Spectrum | None:
    """Thin out singular `values (..., n)`, descending, the one at `rank` kept; None where all are zero.

    Example:
        >>> import torch
        >>> thinned(torch.tensor([4.0, 2.0, 1.0]), full_rank=8, rank=2).values
        (1.0, 0.5, 0.25)
    """
    mean = values.double().square().reshape(-1, values.shape[-1]).mean(dim=0).sqrt().cpu().numpy()
    if not len(mean) or not mean[0] > 0:
        return None
    evenly = np.geomspace(1, len(mean), POINTS - 1).round().astype(int)
    ranks = np.unique([*evenly, min(rank, len(mean))])
    kept = mean[ranks - 1] / mean[0]
    return Spectrum(
        of=of, ranks=tuple(ranks.tolist()), values=tuple(float(f"{value:.4g}") for value in kept), full_rank=full_rank
    )
