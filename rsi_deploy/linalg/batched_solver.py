"""Factorize small weights of equal shape in one batch; each gets the same bytes as alone.

A small product leaves most of a processor idle and has a fixed cost of some microseconds: a batch of eight weights of
64 x 64 takes a fifth of the time, of 256 x 256 half. From 384 x 384 on a batch saves nothing and is not used.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rsi_deploy.linalg.solver import Factors, Solution, Solver

SMALL = 1 << 16  # numbers in a weight
MOST = 1 << 22  # numbers of a batch: 16 MB, and about twice that for its blocks


def gains_from_batching(shape: tuple[int, int]) -> bool:
    """Return whether weights of this shape `(out, in)` are faster in a batch."""
    return shape[0] * shape[1] <= SMALL


class SolverLike(Protocol):
    """A solver, or a cache of solutions in front of one."""

    def solve(self, weight: Tensor, rank: int, *, site: str = "") -> Solution:
        """Return the solution as `Solver.solve` does."""


class FactorizationRequest(NamedTuple):
    """A weight `(out, in)` and the rank for its factorization."""

    weight: Tensor
    rank: int


@dataclass(frozen=True, kw_only=True)
class SolutionCache:
    """Solutions computed in advance, by site, each used once; other sites are solved on demand."""

    solver: Solver
    ready: dict[str, Solution]

    def solve(self, weight: Tensor, rank: int, *, site: str = "") -> Solution:
        """Return the solution of a weight `(out, in)` or `(1, out, in)` as `Solver.solve` does."""
        known = self.ready.pop(site, None)
        if known is None:
            return self.solver.solve(weight, rank, site=site)
        left, right = known.factors
        outer = weight.shape[:-2]
        return known._replace(factors=Factors(left.reshape(*outer, *left.shape), right.reshape(*outer, *right.shape)))


def solve_in_batches(solver: Solver, requests: Mapping[str, FactorizationRequest]) -> SolutionCache:
    """Solve all weights that are faster in a batch; if one of a batch fails, the whole batch is left for later.

    Args:
        solver: settings.
        requests: site -> weight on its device, and rank.
    """
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, (weight, rank) in requests.items():
        if gains_from_batching((weight.shape[0], weight.shape[1])) and 1 <= rank <= min(weight.shape, default=0):
            alike[weight.shape, weight.dtype, weight.device, rank].append(name)
    ready: dict[str, Solution] = {}
    for names in alike.values():
        size = MOST // requests[names[0]].weight.numel()
        for batch in (names[start : start + size] for start in range(0, len(names), size)):
            if len(batch) > 1 and solver.batches(requests[batch[0]].weight):
                try:
                    solutions = solver.solve_many(
                        [requests[name].weight for name in batch], requests[batch[0]].rank, sites=batch
                    )
                except (ValueError, torch.OutOfMemoryError):
                    continue  # solving them one by one names the bad one, or needs less memory
                ready |= dict(zip(batch, solutions, strict=True))
    return SolutionCache(solver=solver, ready=ready)
