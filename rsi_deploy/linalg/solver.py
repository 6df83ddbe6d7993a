"""Randomized subspace iteration (RSI): low-rank factors of a weight, and how far they are from it.

With a weight `W (out, in)`, a rank `k` and `q` power iterations (arXiv 2604.02659, algorithm 1):

    Y = randn(in, k)
    repeat q times:  X = orth(W Y);  Y = W^T X
    left = X (out, k),  right = Y^T (k, in),  left @ right = X X^T W

so the approximation is `W` projected on the span of `X`: no inverse, no SVD. `q = 1` is the randomized SVD (RSVD) of
Halko, Martinsson and Tropp (2011, algorithm 4.1); scikit-learn's `n_iter` and Halko's `q` are ours minus one.
With oversampling `p`, the iteration runs on `k + p` columns and is truncated through the SVD of the small `Y^T`.

The same subspace may be reached in other ways, and the products may be made in bfloat16 but for the last one: how is
`rsi_deploy.kernel`, which route a cost model measured on the machine chooses (`kernel.cost`).

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
from rsi_deploy.linalg.certified_norm import Interval, certified_norm
from rsi_deploy.linalg.checks import at, checked
from rsi_deploy.linalg.factors import Factors, balanced, stored
from rsi_deploy.linalg.memory import on_cpu
from rsi_deploy.linalg.operand import working_dtype
from rsi_deploy.linalg.solve import How, solve

__all__ = [
    "Factors",
    "Interval",
    "Method",
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
    """Factors, and how they came about.

    Attributes:
        factors: `left`, `right`.
        route: that was taken: "direct", "chebyshev", "gram", "krylov", "exact", or "svd" for that method.
        power_iterations: that were done (shifted ones, and block Krylov's blocks, do more each); 0: exact.
        note: what was done otherwise than asked, in words, or "".
        seconds: that it took.
    """

    factors: Factors
    route: str
    power_iterations: int
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How factors are computed: the settings of one run, the same for every site.

    Attributes:
        method: "rsi"; "rsvd" (one power iteration, the baseline); or "svd" (exact, the other baseline).
        power_iterations: the paper's q, at least 1, or "auto": until another pass would gain less than 1 %. Ignored by
            "rsvd" (always 1) and "svd".
        oversampling: extra sketch columns, truncated away at the end. The paper uses none.
        seed: with the site's name it fixes the random sketch, so filters and order change nothing.
        route: of "rsi": "auto" takes the cheapest by the cost model, else the one named. "rsvd" is always direct.
        mixed_precision: of "rsi": bfloat16 in the iterations where it is measured to be faster and does no harm.
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
        """Factorize `weight (..., out, in)` at `rank`, and say how it was done.

        A rank above `min(out, in)` gives the exact factors of that rank, with a note. Where a GPU's memory does not
        hold the blocks, the CPU's does, with a note.
        """
        started = time.perf_counter()
        full = min(weight.shape[-2:], default=0) if weight.ndim > 1 else 0
        note = f"rank {rank} is above full rank: exact factors of rank {full}" if rank > full > 0 else ""
        solution = None
        with suppress(torch.OutOfMemoryError):
            solution = self._solved(weight, rank, site)
        if solution is None:
            solution = self._solved(*on_cpu(weight), rank, site)
            log.warning("%sthe GPU's memory does not hold the blocks: factorized on the CPU", at(site))
            factors = Factors(*(factor.to(weight.device) for factor in solution.factors))
            solution = solution._replace(factors=factors, note="factorized on the CPU, for want of GPU memory")
        note = "; ".join(filter(None, (note, solution.note)))
        return solution._replace(note=note, seconds=time.perf_counter() - started)

    def _solved(self, weight: Tensor, rank: int, site: str) -> Solution:
        if self.method == "svd":
            return Solution(exact_svd(weight, rank, site=site), "svd", 0)
        W, rank, scale = checked(weight, rank, site)
        how = self._how()
        if how.q != "auto" and how.q < 1:
            raise ValueError(f"{at(site)}power_iterations must be at least 1 (1 is RSVD), but got {how.q!r}")
        if self.oversampling < 0:
            raise ValueError(f"{at(site)}oversampling must not be negative, but got {self.oversampling!r}")
        columns = min(rank + self.oversampling, *W.shape[-2:])
        solved = solve(W, lambda side: _sketch(W, side, columns, self.seed, site), columns, rank, scale, how)
        if not torch.isfinite(solved.Y.sum()) and not torch.isfinite(solved.Y).all():
            raise ValueError(f"{at(site)}the factors do not fit into {working_dtype(W)}; pass weight.double()")
        return Solution(stored(solved.X, solved.Y.mT, weight.dtype), solved.route, solved.q)

    def batches(self, weight: Tensor) -> bool:
        """Whether weights like this one `(out, in)` go through batched products in `many`."""
        return weight.ndim == 2 and is_small(weight) and self.method != "svd" and self.route not in ("gram", "krylov")

    def many(self, weights: Sequence[Tensor], rank: int, *, sites: Sequence[str]) -> list[Solution]:
        """Factorize weights of one shape, dtype and device at once, each with its own site's sketch.

        Those that `batches` names go through batched products, others one after another. The bytes of each are those
        that it has alone; its seconds are its share.
        """
        if not self.batches(weights[0]) or self.power_iterations == "auto":
            return [self.solve(weight, rank, site=site) for weight, site in zip(weights, sites, strict=True)]
        started = time.perf_counter()
        parts = [checked(weight, rank, site) for weight, site in zip(weights, sites, strict=True)]
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

    def _how(self) -> How:
        baseline = self.method == "rsvd"
        return How(
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
    """Low-rank factors of `weight (..., out, in)` by randomized subspace iteration.

    Computes in float32 (float64 for float64 weights) and returns the weight's dtype; 16-bit factors are balanced in
    scale first, so that neither overflows nor underflows. `left` has orthonormal columns for 32 and 64 bits.
    Deterministic in (seed, site) on one machine; a GPU draws other numbers than a CPU.

    Args:
        weight: float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        rank: at least 1; above `min(out, in)` the exact factors of that rank come back.
        power_iterations: the paper's q, at least 1 (1 is RSVD), or "auto".
        oversampling: extra sketch columns p; `rank + p` is cut at `min(out, in)`.
        seed: together with `site`, the random stream.
        site: the weight's name, for the random stream and for error messages.
        route: "direct" is the algorithm above; "auto" the cheapest of the equivalent ones; or "chebyshev", "gram",
            "krylov", "exact".
        mixed_precision: the iterations in bfloat16, where that is measured to be faster and does no harm.

    Raises:
        ValueError: a rank, q, p or route out of range, a weight that is not a real floating matrix, or NaN/Inf in it.

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
    """The Gaussian sketch `(..., side, columns)` of a site, in the working precision; on a GPU by columns.

    Drawn where the weight is: a CPU takes up to twenty times as long to draw one as a GPU to factorize with it.
    """
    generator = torch.Generator(weight.device).manual_seed(stream_seed(seed, site))
    shape = (columns, side) if weight.is_cuda else (side, columns)
    drawn = torch.randn(
        *weight.shape[:-2], *shape, generator=generator, dtype=working_dtype(weight), device=weight.device
    )
    return drawn.mT if weight.is_cuda else drawn


def rsvd(weight: Tensor, rank: int, *, oversampling: int = 0, seed: int = 0, site: str = "") -> Factors:
    """Randomized SVD: `rsi` with one power iteration, offered under its own name as the baseline."""
    return rsi(weight, rank, power_iterations=1, oversampling=oversampling, seed=seed, site=site)


def exact_svd(weight: Tensor, rank: int, *, site: str = "") -> Factors:
    """The optimal factors `left = U_k`, `right = S_k V_k^T` of `weight (..., out, in)` (Eckart-Young)."""
    W, rank, _ = checked(weight, rank, site)
    U, S, Vh = torch.linalg.svd(W.to(working_dtype(W)), full_matrices=False)
    left = U[..., :rank].contiguous()  # a slice would keep all of U alive
    return stored(left, S[..., :rank, None] * Vh[..., :rank, :], weight.dtype)


def stream_seed(seed: int, site: str) -> int:
    """The 63-bit seed of one site's random stream: equal for equal (seed, site), unrelated otherwise."""
    digest = hashlib.sha256(f"{seed}\0{site}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def singular_values(weight: Tensor) -> Tensor:
    """All singular values of `weight (..., out, in)`, descending, float64 `(..., min(out, in))`.

    The square roots of the eigenvalues of the smaller Gram matrix in float64: several times faster than an SVD and
    exact to about 1e-8 of the largest one, which is the rounding level of a float32 weight.
    """
    W = weight.double()
    gram = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(-1).clamp_min(0).sqrt()


def normalized_error(weight: Tensor, factors: Factors) -> float:
    """`||W - left @ right||_2 / s_{rank+1}(W)` of a matrix `(out, in)`: 1.0 is optimal. Exact, by SVDs in float64.

    Returns 1.0 when both are zero to rounding (full rank, or a weight of lower rank than `rank`).
    """
    W = weight.double()
    rank = factors.left.shape[-1]
    s = torch.linalg.svdvals(W)
    optimum = float(s[rank]) if rank < s.numel() else 0.0
    error = float(torch.linalg.matrix_norm(W - factors.left.double() @ factors.right.double(), 2))
    rounding = float(s[0]) * rounding_level(weight.dtype)
    return 1.0 if max(error, optimum) <= rounding else error / max(optimum, rounding)


def rounding_level(dtype: torch.dtype) -> float:
    """The error, relative to the weight, below which factors stored in `dtype` count as exact.

    100 roundings of the computation or one of the storage. (A few of the storage would already hide the whole tail of a
    bfloat16 weight's spectrum, and with it every error.)
    """
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return max(100 * torch.finfo(computed).eps, torch.finfo(dtype).eps)


class Residual(NamedTuple):
    """The leading singular triplet of `W - left @ right`: `norm` (from below), `u (..., out)`."""

    norm: Tensor
    u: Tensor


def residual_norm(weight: Tensor, factors: Factors, *, iterations: int = 8, columns: int = 4) -> Residual:
    """Estimate `||W - left @ right||_2` from below, without ever forming the residual.

    Block power iteration with `columns` vectors on the residual as an operator: 4 * columns * iterations passes of
    `out*in` flops. What it finds is a Rayleigh-Ritz value, so it never exceeds the true norm (but for rounding).

    Returns:
        `norm`, one float32/float64 value per leading batch entry, and the left singular vector it belongs to.
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
