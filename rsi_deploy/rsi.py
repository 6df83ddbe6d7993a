"""Randomized subspace iteration (RSI): low-rank factors of a weight, and how far they are from it.

With a weight `W (out, in)`, a rank `k` and `q` power iterations (arXiv 2604.02659, algorithm 1):

    Y = randn(in, k)
    repeat q times:  X = orth(W Y);  Y = W^T X
    left = X (out, k),  right = Y^T (k, in),  left @ right = X X^T W

so the approximation is `W` projected on the span of `X`: no inverse, no SVD. `q = 1` is the randomized SVD (RSVD) of
Halko, Martinsson and Tropp (2011, algorithm 4.1); scikit-learn's `n_iter` and Halko's `q` are ours minus one.
With oversampling `p`, the iteration runs on `k + p` columns and is truncated through the SVD of the small `Y^T`.

Leading dimensions are a batch: a grouped Conv's weight is `(groups, out/groups, in/groups*kh*kw)`.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Method = Literal["rsi", "rsvd", "svd"]


class Factors(NamedTuple):
    """`left (..., out, rank)` and `right (..., rank, in)`, in the dtype and on the device of the weight."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How factors are computed: the settings of one run, the same for every site.

    Attributes:
        method: "rsi"; "rsvd" (one power iteration, the baseline); or "svd" (exact, the other baseline).
        power_iterations: the paper's q, at least 1. Ignored by "rsvd" (always 1) and "svd".
        oversampling: extra sketch columns, truncated away at the end. The paper uses none.
        seed: with the site's name it fixes the random sketch, so filters and order change nothing.
    """

    method: Method = "rsi"
    power_iterations: int = 4
    oversampling: int = 0
    seed: int = 0

    def __call__(self, weight: Tensor, rank: int, *, site: str = "") -> Factors:
        """Factorize `weight (..., out, in)` at `rank`; see `rsi` and `exact_svd`."""
        if self.method == "svd":
            return exact_svd(weight, rank, site=site)
        return rsi(
            weight,
            rank,
            power_iterations=1 if self.method == "rsvd" else self.power_iterations,
            oversampling=self.oversampling,
            seed=self.seed,
            site=site,
        )


def rsi(
    weight: Tensor,
    rank: int,
    *,
    power_iterations: int = 4,
    oversampling: int = 0,
    seed: int = 0,
    site: str = "",
) -> Factors:
    """Low-rank factors of `weight (..., out, in)` by randomized subspace iteration.

    Computes in float32 (float64 for float64 weights) and returns the weight's dtype; 16-bit factors are balanced in
    scale first, so that neither overflows nor underflows. `left` has orthonormal columns for 32 and 64 bits.
    Deterministic in (seed, site): the sketch is always drawn on the CPU, so CPU and CUDA start from the same one.

    Args:
        weight: float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        rank: between 1 and `min(out, in)`.
        power_iterations: the paper's q, at least 1 (1 is RSVD).
        oversampling: extra sketch columns p; `rank + p` is cut at `min(out, in)`.
        seed: together with `site`, the random stream.
        site: the weight's name, for the random stream and for error messages.

    Raises:
        ValueError: a rank, q or p out of range, a weight that is not a floating matrix, or NaN/Inf in it.

    Example:
        >>> weight = torch.randn(30, 5) @ torch.randn(5, 40)
        >>> left, right = rsi(weight, 5)
        >>> left.shape, right.shape
        (torch.Size([30, 5]), torch.Size([5, 40]))
        >>> torch.allclose(left @ right, weight, atol=1e-4)
        True
    """
    W = _checked(weight, rank, site)
    if power_iterations < 1:
        raise ValueError(f"{_at(site)}power_iterations must be at least 1 (1 is RSVD), but got {power_iterations!r}")
    if oversampling < 0:
        raise ValueError(f"{_at(site)}oversampling must not be negative, but got {oversampling!r}")
    *batch, out_features, in_features = W.shape
    columns = min(rank + oversampling, out_features, in_features)

    generator = torch.Generator().manual_seed(stream_seed(seed, site))
    Y = torch.randn(*batch, in_features, columns, generator=generator, dtype=W.dtype).to(W.device)
    for _ in range(power_iterations):
        X = torch.linalg.qr(W @ _unit_(Y)).Q  # (..., out, columns)
        del Y  # before the next one is made: at most one block of the input's width lives
        Y = W.mT @ X  # (..., in, columns)
    if columns > rank:
        U, S, Vh = torch.linalg.svd(Y.mT, full_matrices=False)
        X = X @ U[..., :rank]
        Y = (S[..., :rank, None] * Vh[..., :rank, :]).mT
    return _stored(X, Y.mT, weight.dtype)


def rsvd(weight: Tensor, rank: int, *, oversampling: int = 0, seed: int = 0, site: str = "") -> Factors:
    """Randomized SVD: `rsi` with one power iteration, offered under its own name as the baseline."""
    return rsi(weight, rank, power_iterations=1, oversampling=oversampling, seed=seed, site=site)


def exact_svd(weight: Tensor, rank: int, *, site: str = "") -> Factors:
    """The optimal factors `left = U_k`, `right = S_k V_k^T` of `weight (..., out, in)` (Eckart-Young)."""
    W = _checked(weight, rank, site)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    left = U[..., :rank].contiguous()  # a slice would keep all of U alive
    return _stored(left, S[..., :rank, None] * Vh[..., :rank, :], weight.dtype)


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


def balanced(left: Tensor, right: Tensor) -> Factors:
    """The same product with each rank-one term's scale shared evenly between its two vectors."""
    row = right.norm(dim=-1)
    column = left.norm(dim=-2)
    scale = torch.where((row > 0) & (column > 0), (row / column.clamp_min(1e-30)).sqrt(), torch.ones_like(row))
    return Factors(left * scale[..., None, :], right / scale[..., :, None])


def _unit_(Y: Tensor) -> Tensor:
    """`Y` with a largest entry of 1: only its span matters, and iterating squares the scale past what floats hold."""
    low, high = Y.amin(dim=(-2, -1), keepdim=True), Y.amax(dim=(-2, -1), keepdim=True)
    return Y.div_(torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny))


def _stored(left: Tensor, right: Tensor, dtype: torch.dtype) -> Factors:
    if dtype.itemsize < 4:
        left, right = balanced(left, right)
    return Factors(left.to(dtype), right.to(dtype))


def _computed(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _checked(weight: Tensor, rank: int, site: str) -> Tensor:
    if not weight.is_floating_point() or weight.ndim < 2:
        raise ValueError(
            f"{_at(site)}a weight must be floating, (..., out, in), but got {weight.dtype} {tuple(weight.shape)}"
        )
    full = min(weight.shape[-2:])
    if not 1 <= rank <= full:
        raise ValueError(f"{_at(site)}rank must be between 1 and min(out, in) = {full}, but got {rank!r}")
    W = _computed(weight)
    # A sum is finite only if every term is, and costs no mask of the weight's size; it may overflow, so then look.
    if not torch.isfinite(W.sum()) and not torch.isfinite(W).all():
        bad = int((~torch.isfinite(W)).sum())
        raise ValueError(
            f"{_at(site)}the weight holds {bad} NaN or infinite values of {W.numel()}; repair it or exclude it"
        )
    return W


def _at(site: str) -> str:
    return f"site {site!r}: " if site else ""
