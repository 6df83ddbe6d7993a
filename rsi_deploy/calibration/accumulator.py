"""Accumulate the moments of one site, with a buffer for small batches of rows and errors that name the site.

    add (x, y) --> [ buffers of up to in_features rows, or `buffer_size` numbers ] --> MomentAccumulator, by fold

Merging a batch into the moments costs `in_features^2` float64 operations however few rows it has, and a small site
spends most of its time on call overhead. The buffer merges several small batches at once.
"""

import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.moments import GRAM_LIMIT, MomentAccumulator, Moments, Samples, fold_count
from rsi_deploy.core.errors import ModelError

BUFFER_SIZE = 2**19
"""Numbers that the buffer of a site with few inputs holds: 2 MB."""


class SiteAccumulator:
    """An accumulator of one site's moments.

    Args:
        site: the site.
        buffer_size: numbers that the buffer may hold if the site has few inputs.
    """

    def __init__(self, site: CalibratedSite, buffer_size: int = 0) -> None:
        self._name = site.name
        self._moments = MomentAccumulator(site.in_features)
        self._folds = fold_count(site.in_features)
        limit = max(site.in_features, buffer_size // (site.groups * site.in_features))
        self._buffered_rows = 0 if site.in_features > GRAM_LIMIT else limit // self._folds
        self._buffers: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return self._moments.rows + sum(map(_rows, self._buffers.values()))

    def add(self, x: Tensor, y: Tensor, counts: Tensor | None = None, *, fold: int = 0) -> None:
        """Add rows `x (groups, rows, in)` and `y (groups, rows, out)`, which must not change afterwards.

        `counts (rows,)` are the weights of the rows; None for 1. `fold` is the number of their batch.

        Raises:
            ModelError: NaN or infinite values in these rows or in buffered ones.
        """
        fold %= self._folds
        buffer = self._buffers.setdefault(fold, [])
        buffer.append((x, y, x.new_ones(x.shape[-2]) if counts is None else counts))
        if _rows(buffer) >= self._buffered_rows:
            self._flush(fold)

    def result(self) -> Moments | Samples | None:
        """Return the moments of all rows, or None without rows.

        Raises:
            ModelError: NaN or infinite values in buffered rows.
        """
        for fold in sorted(self._buffers):
            self._flush(fold)
        return self._moments.result()

    def _flush(self, fold: int) -> None:
        xs, ys, counts = zip(*self._buffers.pop(fold), strict=True)
        try:
            x, y = (some[0] if len(some) == 1 else torch.cat(some, dim=-2) for some in (xs, ys))
            self._moments.add(x, y, torch.cat(counts), fold=fold)
        except ValueError as error:
            name = self._name
            raise ModelError(f"site {name!r}: {error} (type --exclude {name!r} to leave it dense)") from error


def _rows(buffer: list[tuple[Tensor, Tensor, Tensor]]) -> int:
    return sum(len(counts) for _, _, counts in buffer)
