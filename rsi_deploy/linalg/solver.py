"""Randomized subspace iteration (RSI): low-rank factors of a weight, and their distance from it.

With a weight `W (out, in)`, a rank `k` and `q` power iterations (arXiv 2604.02659, algorithm 1):

    Y = randn(in, k)
    repeat q times:  X = orth(W Y);  Y = W^T X
    left = X (out, k),  right = Y^T (k, in),  left @ right = X X^T W

so the approximation is `W` projected on the span of `X`, without an inverse or an SVD. `q = 1` is the randomized SVD
(RSVD) of Halko, Martinsson and Tropp (2011, algorithm 4.1); scikit-learn's `n_iter` and Halko's `q` are one less.
With oversampling `p`, the iteration runs on `k + p` columns and is truncated through the SVD of the small `Y^T`.

Other routes reach the same subspace, and all products except the last may use bfloat16. A cost model measured on the
machine chooses the route (`linalg.cost_model`).

Leading dimensions are a batch: a grouped Conv's weight is `(groups, out/groups, in/groups*kh*kw)`.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rsi_deploy.linalg.batched import is_small
from rsi_deploy.linalg.certified_norm import NormInterval, certified_norm
from rsi_deploy.linalg.checks import check_weight, site_prefix
from rsi_deploy.linalg.factors import Factors, balanced, stored
from rsi_deploy.linalg.memory import on_cpu
from rsi_deploy.linalg.operand import working_dtype
from rsi_deploy.linalg.solve import SolveSettings, solve

__all__ = [
    "Factors",
    "Method",
    "NormInterval",
    "PowerIterations",
    "Residual",
    "Route",
    "Solution",
    "Solver",
    "balanced",
    "certified_norm",
    "exact_svd",
    "normalized_error",
    "residual_norm",
    "rounding_level",
    "rsi",
    "rsvd",
    "singular_values",
    "stream_seed",
]

Method = Literal["rsi", "rsvd", "svd"]
Route = Literal["auto", "direct", "chebyshev", "gram", "krylov", "exact"]
PowerIterations = int | Literal["auto"]
log = logging.getLogger(__name__)


class Solution(NamedTuple):
    """Factors, and how they were computed.

    Attributes:
        factors: `left` and `right`.
        route: "direct", "chebyshev", "gram", "krylov", "exact", or "svd" for that method.
        power_iterations: number of iterations (shifted ones, and blocks of block Krylov, count as one); 0 if exact.
        note: what differs from the request, in words, or "".
        seconds: time of the computation.
    """

    factors: Factors
    route: str
    power_iterations: int
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Solver:
    """The settings of a run for computing factors, the same for every site.

    Attributes:
        method: "rsi"; "rsvd" (one power iteration, the baseline); or "svd" (exact, the other baseline).
        power_iterations: the paper's q, at least 1, or "auto" to stop when another iteration would gain less than 1 %.
            Ignored by "rsvd" (always 1) and "svd".
        oversampling: extra columns of the sketch, truncated at the end; none in the paper.
        seed: random seed; together with the site's name it determines the sketch, so filters and order do not matter.
        route: route of "rsi"; "auto" chooses the fastest by the cost model. "rsvd" always uses the direct one.
        mixed_precision: whether "rsi" may use bfloat16 in the iterations where it is faster and does no harm.
    """

    method: Method = "rsi"
    power_iterations: PowerIterations = 4
    oversampling: int = 0
    seed: int = 0
    route: Route = "auto"
    mixed_precision: bool = True

    def __call__(self, weight: Tensor, rank: int, *, site: str = "") -> Factors:
        """Factorize `weight (..., out, in)` at `rank`; see `rsi` and `exact_svd`."""
        return self.solve(weight, rank, site=site).factors

    def solve(self, weight: Tensor, rank: int, *, site: str = "") -> Solution:
        """Factorize `weight (..., out, in)` at `rank`, and describe how it was done.

        A rank above `min(out, in)` gives exact factors of that rank, with a note. If a GPU's memory is too small, the
        CPU computes the factors, with a note.
        """
        started = time.perf_counter()
        full = min(weight.shape[-2:], default=0) if weight.ndim > 1 else 0
        note = f"rank {rank} is above full rank: exact factors of rank {full}" if rank > full > 0 else ""
        solution = None
        with suppress(torch.OutOfMemoryError):
            solution = self._solved(weight, rank, site)
        if solution is None:
            (moved,) = on_cpu(weight)
            solution = self._solved(moved, rank, site)
            log.warning("%sthe GPU's memory is too small: factorized on the CPU", site_prefix(site))
            factors = Factors(*(factor.to(weight.device) for factor in solution.factors))
            solution = solution._replace(
                factors=factors, note="factorized on the CPU, as the GPU's memory is too small"
            )
        note = "; ".join(filter(None, (note, solution.note)))
        return solution._replace(note=note, seconds=time.perf_counter() - started)

    def _solved(self, weight: Tensor, rank: int, site: str) -> Solution:
        if self.method == "svd":
            return Solution(exact_svd(weight, rank, site=site), "svd", 0)
        W, rank, scale = check_weight(weight, rank, site)
        how = self._how()
        if how.q != "auto" and how.q < 1:
            raise ValueError(f"{site_prefix(site)}power_iterations must be at least 1 (1 is RSVD), but got {how.q!r}")
        if self.oversampling < 0:
            raise ValueError(f"{site_prefix(site)}oversampling must not be negative, but got {self.oversampling!r}")
        columns = min(rank + self.oversampling, *W.shape[-2:])
        solved = solve(W, lambda side: _sketch(W, side, columns, self.seed, site), columns, rank, scale, how)
        if not torch.isfinite(solved.Y.sum()) and not torch.isfinite(solved.Y).all():
            raise ValueError(f"{site_prefix(site)}the factors do not fit into {working_dtype(W)}; pass weight.double()")
        return Solution(stored(solved.X, solved.Y.mT, weight.dtype), solved.route, solved.q)

    def batches(self, weight: Tensor) -> bool:
        """Return whether `solve_many` factorizes weights like this one `(out, in)` in batched products."""
        return weight.ndim == 2 and is_small(weight) and self.method != "svd" and self.route not in ("gram", "krylov")

    def solve_many(self, weights: Sequence[Tensor], rank: int, *, sites: Sequence[str]) -> list[Solution]:
        """Factorize weights of one shape, dtype and device, each with its own site's sketch.

        Weights for which `batches` is true use batched products, others are factorized one by one. The bytes are the
        same as for a single weight; the seconds are divided evenly.
        """
        if not self.batches(weights[0]) or self.power_iterations == "auto":
            return [self.solve(weight, rank, site=site) for weight, site in zip(weights, sites, strict=True)]
        started = time.perf_counter()
        parts = [check_weight(weight, rank, site) for weight, site in zip(weights, sites, strict=True)]
        columns = min(rank + self.oversampling, *weights[0].shape)

        def draw(side: int) -> Tensor:
            pairs = zip(parts, sites, strict=True)
            return torch.stack([_sketch(part.weight, side, columns, self.seed, site) for part, site in pairs])

        stack = torch.stack([part.weight for part in parts])
        solved = solve(stack, draw, columns, parts[0].rank, 1.0, self._how())
        if not torch.isfinite(solved.Y).all():
            raise ValueError(f"the factors of one of {', '.join(sites)} do not fit into {working_dtype(stack)}")
        pairs = [stored(X.clone(), Y.mT, stack.dtype) for X, Y in zip(solved.X, solved.Y, strict=True)]
        seconds = (time.perf_counter() - started) / len(pairs)
        return [Solution(factors, solved.route, solved.q, seconds=seconds) for factors in pairs]

    def _how(self) -> SolveSettings:
        baseline = self.method == "rsvd"
        return SolveSettings(
            route="direct" if baseline else self.route,
            q=1 if baseline else self.power_iterations,
            mixed=self.mixed_precision and not baseline,
        )


def rsi(
    weight: Tensor,
    rank: int,
    *,
    power_iterations: PowerIterations = 4,
    oversampling: int = 0,
    seed: int = 0,
    site: str = "",
    route: Route = "direct",
    mixed_precision: bool = False,
) -> Factors:
    """Compute low-rank factors of `weight (..., out, in)` by randomized subspace iteration.

    Computes in float32 (float64 for float64 weights) and returns the weight's dtype. 16-bit factors are balanced in
    scale, so that neither overflows nor underflows; for 32 and 64 bits `left` has orthonormal columns. The result is
    deterministic in (seed, site) on one machine; a GPU draws other random numbers than a CPU.

    Args:
        weight: float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        rank: at least 1; above `min(out, in)` the result is exact.
        power_iterations: the paper's q, at least 1 (1 is RSVD), or "auto".
        oversampling: extra columns p of the sketch; `rank + p` is limited to `min(out, in)`.
        seed: random seed, used together with `site`.
        site: name of the weight, for the random stream and error messages.
        route: "direct" is the algorithm above, "auto" the fastest of the equivalent ones; or "chebyshev", "gram",
            "krylov", "exact".
        mixed_precision: whether iterations may use bfloat16 where it is faster and does no harm.

    Raises:
        ValueError: A rank, q, p or route is out of range, or the weight is not a finite real floating matrix.

    Example:
        >>> weight = torch.randn(30, 5) @ torch.randn(5, 40)
        >>> left, right = rsi(weight, 5)
        >>> left.shape, right.shape
        (torch.Size([30, 5]), torch.Size([5, 40]))
        >>> torch.allclose(left @ right, weight, atol=1e-4)
        True
    """
    solver = Solver(
        power_iterations=power_iterations,
        oversampling=oversampling,
        seed=seed,
        route=route,
        mixed_precision=mixed_precision,
    )
    return solver(weight, rank, site=site)


def _sketch(weight: Tensor, side: int, columns: int, seed: int, site: str) -> Tensor:
    """Draw the Gaussian sketch `(..., side, columns)` of a site in the working precision; on a GPU by columns.

    It is drawn on the weight's device, as a CPU takes up to twenty times as long as a GPU's whole factorization.
    """
    generator = torch.Generator(weight.device).manual_seed(stream_seed(seed, site))
    shape = (columns, side) if weight.is_cuda else (side, columns)
    drawn = torch.randn(
        *weight.shape[:-2], *shape, generator=generator, dtype=working_dtype(weight), device=weight.device
    )
    return drawn.mT if weight.is_cuda else drawn


def rsvd(weight: Tensor, rank: int, *, oversampling: int = 0, seed: int = 0, site: str = "") -> Factors:
    """Compute the randomized SVD: `rsi` with one power iteration, the baseline."""
    return rsi(weight, rank, power_iterations=1, oversampling=oversampling, seed=seed, site=site)


def exact_svd(weight: Tensor, rank: int, *, site: str = "") -> Factors:
    """Return the optimal factors `left = U_k`, `right = S_k V_k^T` of `weight (..., out, in)` (Eckart-Young)."""
    W, rank, _ = check_weight(weight, rank, site)
    U, S, Vh = torch.linalg.svd(W.to(working_dtype(W)), full_matrices=False)
    left = U[..., :rank].contiguous()  # a slice would keep all of U in memory
    return stored(left, S[..., :rank, None] * Vh[..., :rank, :], weight.dtype)


def stream_seed(seed: int, site: str) -> int:
    """Return the 63-bit seed of a site's random stream, unrelated for different (seed, site)."""
    digest = hashlib.sha256(f"{seed}\0{site}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def singular_values(weight: Tensor) -> Tensor:
    """Return all singular values of `weight (..., out, in)`, descending, float64 `(..., min(out, in))`.

    They are the square roots of the eigenvalues of the smaller Gram matrix in float64. This is several times faster
    than an SVD, and exact to about 1e-8 of the largest one, the rounding level of a float32 weight.
    """
    W = weight.double()
    gram = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1).clamp_min(0).sqrt()


def normalized_error(weight: Tensor, factors: Factors) -> float:
    """Return `||W - left @ right||_2 / s_{rank+1}(W)` of a matrix `(out, in)` by SVDs in float64; 1.0 is optimal.

    The result is 1.0 if both are zero to rounding (full rank, or a weight of lower rank than `rank`).
    """
    W = weight.double()
    rank = factors.left.shape[-1]
    s = torch.linalg.svdvals(W)
    optimum = float(s[rank]) if rank < s.numel() else 0.0
    error = float(torch.linalg.matrix_norm(W - factors.left.double() @ factors.right.double(), 2))
    rounding = float(s[0]) * rounding_level(weight.dtype)
    return 1.0 if max(error, optimum) <= rounding else error / max(optimum, rounding)


def rounding_level(dtype: torch.dtype) -> float:
    """Return the error, relative to the weight, below which factors stored in `dtype` count as exact.

    It is 100 roundings of the computation, or one rounding of the stored factors. (A few roundings to bfloat16 would
    already hide the tail of a weight's spectrum, and with it every error.)
    """
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return max(100 * torch.finfo(computed).eps, torch.finfo(dtype).eps)


class Residual(NamedTuple):
    """The leading singular triplet of `W - left @ right`: `norm` (from below), `u (..., out)`."""

    norm: Tensor
    u: Tensor


def residual_norm(weight: Tensor, factors: Factors, *, iterations: int = 8, columns: int = 4) -> Residual:
    """Estimate `||W - left @ right||_2` from below, without forming the residual.

    Block power iteration with `columns` vectors on the residual as an operator: 4 * columns * iterations passes of
    `out*in` flops. The estimate is a Rayleigh-Ritz value, so it never exceeds the true norm, except by rounding.

    Returns:
        `norm`, one float32/float64 value per batch entry, and its left singular vector.
    """
    W = _computed(weight)
    L, R = factors.left.to(W.dtype), factors.right.to(W.dtype)
    *batch, out_features, in_features = W.shape
    columns = min(columns, out_features, in_features)
    generator = torch.Generator().manual_seed(stream_seed(0, "residual"))
    V = torch.randn(*batch, in_features, columns, generator=generator, dtype=W.dtype).to(W.device)
    for _ in range(iterations):
        U = torch.linalg.qr(W @ V - L @ (R @ V)).Q
        V = W.mT @ U - R.mT @ (L.mT @ U)
        scale = V.norm(dim=(-2, -1), keepdim=True)
        B, V = V, V / scale.clamp_min(torch.finfo(W.dtype).tiny)
    A, S, _ = torch.linalg.svd(B.mT, full_matrices=False)
    return Residual(S[..., 0], (U @ A[..., :1]).squeeze(-1))


def _computed(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
