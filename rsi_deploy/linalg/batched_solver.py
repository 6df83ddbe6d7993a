"""Small equal weights factorized together, ahead of the asking: each gets the bytes that it gets alone.

One small product leaves most of a processor idle, and each is called for some microseconds: a batch of eight weights of
64 x 64 takes a fifth of the time, of 256 x 256 half. From 384 x 384 on a batch takes as long as one after another,
and is not made.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsi_deploy.linalg.solver import Factors, Solution, Solver

SMALL = 1 << 16  # numbers of a weight
MOST = 1 << 22  # numbers of a batch: 16 MB, and about twice that for its blocks


def gains(shape: tuple[int, int]) -> bool:
    """Whether weights of this shape `(out, in)` gain by being factorized together."""
    return shape[0] * shape[1] <= SMALL


class Solves(Protocol):
    """What has factors for a site: a `Solver`, or one that has some ready."""

    def solve(self, weight: Tensor, rank: int, *, site: str = "") -> Solution:
        """As `Solver.solve`."""


class Asked(NamedTuple):
    """A weight `(out, in)` and the rank that will be asked for."""

    weight: Tensor
    rank: int


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """The solutions of some sites, by name, each given away once; any other is computed when it is asked for."""

    solver: Solver
    ready: dict[str, Solution]

    def solve(self, weight: Tensor, rank: int, *, site: str = "") -> Solution:
        """As `Solver.solve`, of a weight `(out, in)` or `(1, out, in)` where it is ready."""
        known = self.ready.pop(site, None)
        if known is None:
            return self.solver.solve(weight, rank, site=site)
        left, right = known.factors
        outer = weight.shape[:-2]
        return known._replace(factors=Factors(left.reshape(*outer, *left.shape), right.reshape(*outer, *right.shape)))


def solved_together(solver: Solver, asked: Mapping[str, Asked]) -> Ahead:
    """The solutions of all weights that gain by it; where one of a batch cannot be factorized, none of it is.

    Args:
        solver: the settings.
        asked: weights by site, each on its device.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, (weight, rank) in asked.items():
        if gains((weight.shape[0], weight.shape[1])) and 1 <= rank <= min(weight.shape, default=0):
            alike[weight.shape, weight.dtype, weight.device, rank].append(name)
    ready: dict[str, Solution] = {}
    for names in alike.values():
        size = MOST // asked[names[0]].weight.numel()
        for batch in (names[start : start + size] for start in range(0, len(names), size)):
            if len(batch) > 1 and solver.batches(asked[batch[0]].weight):
                try:
                    solutions = solver.many([asked[name].weight for name in batch], asked[batch[0]].rank, sites=batch)
                except (ValueError, torch.OutOfMemoryError):
                    continue  # one after another says which, or finds room
                ready |= dict(zip(batch, solutions, strict=True))
    return Ahead(solver=solver, ready=ready)
