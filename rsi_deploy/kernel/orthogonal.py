"""Orthonormal bases of tall blocks at the speed of matrix products: CholeskyQR, and what to do where it fails.

    D = diag(|x_1|, ..., |x_k|),  R^T R = (X D^-1)^T (X D^-1)  (Cholesky),  Q = X D^-1 R^-1

(Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020). One pass leaves `|Q^T Q - I| ~ eps |R^-1|^2`, which is
estimated from `R` (k^2 flops): where that is too much, a second pass follows (CholeskyQR2); where Cholesky breaks down
the Gram matrix is shifted first (shifted CholeskyQR3); where that too leaves it ill-conditioned, as for a block of
lower rank than it has columns, Householder's QR, which cannot fail, is taken. The columns of an iterated block are
nearly orthogonal already and differ in scale: hence `D`, and one pass is the rule.

Between two power iterations a basis need only be well-conditioned: `rough_basis` does one shifted pass in bfloat16.
"""

import math

import torch
from torch import Tensor

# The |R^-1|_2 up to which one pass is enough: `|Q^T Q - I| <= 100 eps` at worst, a few eps as measured.
ONE_PASS = 10.0
# The smallest diagonal entry of `R` down to which one pass in bfloat16 is enough.
ROUGH = 0.25
# The least squared diagonal entry of `R` over the shift at which a column was told from a combination of the others.
RESOLVED = 3.0
SHIFTED = 3
# A column below this norm, beside others near 1, has squares that float32 cannot hold: scale first.
SMALLEST = 1e-15


def orthonormal_(X: Tensor) -> Tensor:
    """An orthonormal basis `(..., m, k)` of the span of `X (..., m, k)`, `m >= k`, float32 or float64; `X` is used up.

    Each matrix of a batch is treated by itself: its bytes do not depend on its neighbours.
    """
    if X.ndim > 2:
        return _each(X)
    Q, reached = _one_pass(X)
    if reached <= ONE_PASS:
        return Q
    R, reached = _factor(Q)
    return _divided(Q, R) if reached <= ONE_PASS else torch.linalg.qr(Q).Q


def near_basis_(X: Tensor) -> Tensor:
    """A basis `(m, k)` of the span of `X (m, k)`, float32 or float64, orthonormal to a percent; `X` is used up.

    Between two iterations nothing more is needed, and it takes one pass of CholeskyQR.
    """
    return _one_pass(X)[0]


def _one_pass(X: Tensor) -> tuple[Tensor, float]:
    """A basis of `X (m, k)` with `|Q^T Q - I| < 0.01`, and what `|D R^-1|` its last pass had."""
    R, reached = _factor(X)
    if reached <= _two_passes(X.dtype):
        return _divided(X, R), reached
    Q = _scaled_(X)
    for _ in range(SHIFTED):  # each takes a factor of some hundreds off the condition
        R, reached = _factor(Q, shift=10.0)
        Q = _divided(Q, R)
        R, reached = _factor(Q)
        if reached <= _two_passes(X.dtype):
            return _divided(Q, R), reached
    return torch.linalg.qr(X).Q, 1.0


def rough_basis(X: Tensor) -> tuple[Tensor, float]:
    """A well-conditioned basis `(m, k)` in bfloat16 of the span of `X (m, k)` in bfloat16, to its rounding.

    With it comes the smallest squared diagonal entry of the first `R` over the shift: near 1, some column could not be
    told from a combination of the others.

    Shifted CholeskyQR, whose Gram matrix and quotient are bfloat16 products; again where the first left columns that
    nearly depend on others, as it does for a fresh sketch. The shift is the 2-norm that roundings of the Gram matrix
    reach. Where even so it has no factor, Householder's QR in float32.
    """
    k, resolved = X.shape[1], 0.0
    for index in range(3):
        gram, norms = _normalized((X.mT @ X).float())
        shift = 2.0**-8 * (1 + float(torch.linalg.matrix_norm(gram)) / k**0.5)
        gram.diagonal().add_(shift)
        R, info = torch.linalg.cholesky_ex(gram, upper=True)
        if int(info):
            return torch.linalg.qr(X.float()).Q.to(torch.bfloat16), resolved
        X = X @ (inverse(R) / norms[:, None]).to(torch.bfloat16)
        least = float(R.diagonal().min())
        resolved = resolved if index else least**2 / shift
        if least > ROUGH and least**2 > RESOLVED * shift:
            break
    return X, resolved


def inverse(R: Tensor) -> Tensor:
    """The inverse of an upper triangular `R (k, k)`, by halves: `k^3/3` flops, nearly all of them in products."""
    k = R.shape[0]
    if k <= 128:
        solved: Tensor = torch.linalg.solve_triangular(R, torch.eye(k, dtype=R.dtype, device=R.device), upper=True)
        return solved
    half = k // 2
    first, last = inverse(R[:half, :half]), inverse(R[half:, half:])
    result = torch.zeros_like(R)
    result[:half, :half], result[half:, half:] = first, last
    torch.mm(first, R[:half, half:] @ last, out=result[:half, half:])
    result[:half, half:].neg_()
    return result


def _each(X: Tensor) -> Tensor:
    """A batch: two passes for all at once, Householder's QR for those that need more."""
    Q = X = _scaled_(X)
    good = torch.ones(X.shape[:-2], dtype=torch.bool, device=X.device)
    for _ in range(2):
        R, info = torch.linalg.cholesky_ex(Q.mT @ Q, upper=True)
        # |R^-1| is at least 1/min(diagonal), and rarely much more.
        good &= (info == 0) & (R.diagonal(dim1=-2, dim2=-1).amin(-1) > 4 / _two_passes(X.dtype))
        Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
    bad = ~good | ~torch.isfinite(Q).all(-1).all(-1)
    for index in bad.nonzero().tolist():
        Q[tuple(index)] = torch.linalg.qr(X[tuple(index)]).Q
    return Q


def _scaled_(X: Tensor) -> Tensor:
    """`X` with columns of norm 1 (a zero column stays)."""
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    return X.div_(norms.clamp_min(torch.finfo(X.dtype).tiny))


def _normalized(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram matrix with a diagonal of 1, and the column norms `(k,)` that were taken out of it."""
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram / norms / norms[:, None], norms


def _divided(X: Tensor, R: Tensor) -> Tensor:
    """`X R^-1`, for a well-conditioned `R` as accurate as a triangular solve, and at the speed of a product."""
    return X @ inverse(R)


def _factor(X: Tensor, *, shift: float = 0.0) -> tuple[Tensor, float]:
    """`R` with `R^T R = X^T X`, and an estimate of `|D R^-1|_2`, `D` the column norms (inf: no `R`).

    Args:
        X: `(m, k)`.
        shift: `shift * k` roundings are added to the diagonal of the normalized Gram matrix.
    """
    k = X.shape[1]
    gram, norms = _normalized(X.mT @ X)
    if shift:
        gram.diagonal().add_(shift * k * torch.finfo(X.dtype).eps)
    R, info = torch.linalg.cholesky_ex(gram, upper=True)
    if int(info) or float(norms.min()) < SMALLEST * float(norms.max()):
        return R * norms, float("inf")
    v = torch.linalg.solve_triangular(R, torch.eye(k, 1, dtype=X.dtype, device=X.device).flip(0), upper=True)
    for _ in range(3):  # inverse iteration, from the last column: the smallest diagonal entries stand last
        v = torch.linalg.solve_triangular(R.mT, v / v.norm(), upper=False)
        v = torch.linalg.solve_triangular(R, v / v.norm(), upper=True)
    return R * norms, float(v.norm())


def _two_passes(dtype: torch.dtype) -> float:
    """The `|R^-1|_2` up to which a second pass mends the first: the first then leaves `|Q^T Q - I| < 0.01`."""
    return 0.1 / math.sqrt(torch.finfo(dtype).eps)
