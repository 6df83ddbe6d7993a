"""Store a spectrum in few numbers: enough for a plot, small enough to store for every site.

ranks    1 = i_1 < i_2 < ... , evenly spaced in their logarithm, including the chosen rank and the last known one
values   s_i / s_1 at those ranks
"""

from typing import Literal

import numpy as np
from torch import Tensor

from rsi_deploy.core.sites import Spectrum

POINTS = 24
"""Most stored values: about 0.6 kB per site in report.json."""


def thin_spectrum(
    values: Tensor, full_rank: int, rank: int, of: Literal["weight", "response"] = "weight"
) -> Spectrum | None:
    """Thin out singular `values (..., n)`, descending, keeping the one at `rank`; None if all are zero.

    Example:
        >>> import torch
        >>> thin_spectrum(torch.tensor([4.0, 2.0, 1.0]), full_rank=8, rank=2).values
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
