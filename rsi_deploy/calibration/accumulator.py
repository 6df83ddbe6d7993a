"""One site's moments as its rows come in: few rows wait for others, and a value that is not finite names the site.

    add (x, y) --> [ waiting, less than in_features / 2 rows or than `waiting` numbers ] --> Gathering

A product of few rows costs what merging it costs, `in_features^2` numbers in float64, whatever the rows. At a small
site it costs what the calls cost.
"""

import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.moments import GRAM_LIMIT, Gathering, Moments, Samples
from rsi_deploy.core.errors import ModelError

WAITING = 2**19
"""Numbers of a site with few inputs that may wait for others: 2 MB."""


class Gathered:
    """Gathers the moments of one site.

    Args:
        site: whose rows they are.
        waiting: numbers that wait for others where the site has few inputs.
    """

    def __init__(self, site: CalibratedSite, waiting: int = 0) -> None:
        self._name = site.name
        self._gathering = Gathering(site.in_features)
        few = max(site.in_features // 2, waiting // (site.groups * site.in_features))
        self._enough = 0 if site.in_features > GRAM_LIMIT else few
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def rows(self) -> int:
        """How many rows have come."""
        return self._gathering.rows + self._count

    def add(self, x: Tensor, y: Tensor, counts: Tensor | None = None) -> None:
        """Take in rows `x (groups, rows, in)` and `y (groups, rows, out)`, which must not change afterwards.

        `counts (rows,)` says what each counts; None for 1.

        Raises:
            ModelError: NaN or infinite values, maybe among rows that came before.
        """
        self._waiting.append((x, y, x.new_ones(x.shape[-2]) if counts is None else counts))
        if self._count >= self._enough:
            self._flush()

    def result(self) -> Moments | Samples | None:
        """The moments of all that came; None when nothing did.

        Raises:
            ModelError: as `add`.
        """
        self._flush()
        return self._gathering.result()

    @property
    def _count(self) -> int:
        return sum(len(counts) for _, _, counts in self._waiting)

    def _flush(self) -> None:
        if not self._waiting:
            return
        xs, ys, counts = zip(*self._waiting, strict=True)
        self._waiting.clear()
        try:
            x, y = (some[0] if len(some) == 1 else torch.cat(some, dim=-2) for some in (xs, ys))
            self._gathering.add(x, y, torch.cat(counts))
        except ValueError as error:
            name = self._name
            raise ModelError(f"site {name!r}: {error} (type --exclude {name!r} to leave it dense)") from error
