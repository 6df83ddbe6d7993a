"""Orthonormal bases of tall blocks by matrix products: CholeskyQR with fallbacks.

    D = diag(|x_1|, ..., |x_k|),  R^T R = (X D^-1)^T (X D^-1)  (Cholesky),  Q = X D^-1 R^-1

(Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020). One pass leaves `|Q^T Q - I| ~ eps |R^-1|^2`, which is
estimated from `R` (k^2 flops). If that is too large, a second pass follows (CholeskyQR2; for a nearly orthonormal block
the inverse of the triangle is known without Cholesky). If Cholesky fails, the Gram matrix is shifted first (shifted
CholeskyQR3). If the result is still ill-conditioned, as for a block whose rank is below its number of columns,
Householder's QR is used, which always works. The columns of an iterated block are nearly orthogonal and differ in
scale. So they are scaled by `D`, and one pass usually suffices.

Between two power iterations a basis need only be well-conditioned: `rough_basis_` does one shifted pass in bfloat16.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rsi_deploy.linalg.products.gemm import product

# Up to this |R^-1|_2 one pass suffices: `|Q^T Q - I| <= 100 eps` at worst, a few eps as measured.
ONE_PASS = 10.0
# Up to this many sqrt(eps) of `|Q^T Q - I|_F` a second pass needs no Cholesky factor, as its error is the square.
NEARLY = 3.0
# Least `1 / |D R^-1|` for which one pass over a bfloat16 block suffices, and one with `R^-1` in bfloat16 too.
ROUGH, ROUGHER = 0.003, 0.1
# Least `1 / |D R^-1|` for which columns stay independent when the block is rounded to bfloat16 (about 1/500 each): the
# rounding then tilts the span by a few percent.
INDEPENDENT = 0.1
SHIFTED = 3
# From this many columns on, products with triangles and Gram matrices skip most of the half that is zero or known.
HALVED, HALVED_GPU = 384, 2048
MOST_BLOCKS = 4
# Side of triangles that are solved directly, and side from which a GPU inverts those of one size in a batch.
LEAF, BATCHED = 128, 1536
# Rows per panel; on a GPU, where each call has a fixed cost, as many rows as take these bytes.
PANEL_ROWS, GPU_PANEL_BYTES = 1024, 8 << 20
# The squares of a column below this norm vanish in float32 beside columns of norm 1, so columns are scaled first.
SMALLEST = 1e-15


def orthonormal_(X: Tensor) -> Tensor:
    """Return an orthonormal basis `(..., m, k)` of the span of `X (..., m, k)`, `m >= k`, float32 or float64.

    Overwrites `X`. The bytes of each matrix of a batch do not depend on the others.
    """
    if X.ndim > 2:
        return _each(X)
    Q, reached = _one_pass(X)
    if reached <= ONE_PASS:
        return Q
    gram = gram_of(Q)
    off = gram.clone()
    off.diagonal().sub_(1.0)
    if float(torch.linalg.matrix_norm(off)) <= NEARLY * math.sqrt(torch.finfo(Q.dtype).eps):
        # The inverse of the triangle of I + E is I - (E's triangle, half its diagonal) - O(E^2).
        inverted = off.triu_().neg_()
        inverted.diagonal().mul_(0.5).add_(1.0)
        return times_triangle_(Q, inverted)
    inverted, reached = _factor(*_normalized_(gram))
    return times_triangle_(Q, inverted) if reached <= ONE_PASS else torch.linalg.qr(Q).Q


def near_basis_(X: Tensor) -> Tensor:
    """Return a basis `(m, k)` of the span of `X (m, k)`, orthonormal to a percent, by CholeskyQR; overwrites `X`.

    This accuracy suffices between two iterations.
    """
    return _one_pass(X)[0]


def _one_pass(X: Tensor) -> tuple[Tensor, float]:
    """Return a basis of `X (m, k)` with `|Q^T Q - I| < 0.01`, and `|D R^-1|` of its last pass; overwrites `X`."""
    gram, norms = _normalized_(gram_of(X))
    inverted, reached = _factor(gram, norms)
    if reached <= _two_passes(X.dtype):
        return times_triangle_(X, inverted), reached
    Q = X.clone()  # Householder's needs the columns as they are
    if not _squared(norms):
        gram, norms = _normalized_(gram_of(_scaled_(Q)))
    for _ in range(SHIFTED):  # each reduces the condition by a factor of some hundreds
        gram.diagonal().add_(10.0 * len(gram) * torch.finfo(gram.dtype).eps)
        inverted, reached = _factor(gram, norms)
        if reached == math.inf:
            break
        Q = times_triangle_(Q, inverted)
        gram, norms = _normalized_(gram_of(Q))
        inverted, reached = _factor(gram, norms)
        if reached <= _two_passes(X.dtype):
            return times_triangle_(Q, inverted), reached
    return torch.linalg.qr(X).Q, 1.0


def basis_and_triangle_(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return `Q (m, k)`, orthonormal, and `R (k, k)` with `X = Q R`, float32 or float64; overwrites `X`."""
    inverted, reached = _factor(*_normalized_(gram_of(X)))
    if reached <= ONE_PASS:
        return times_triangle_(X, inverted), inverse(inverted)
    Q = orthonormal_(X.clone())
    return Q, Q.mT @ X


def rough_basis_(X: Tensor, *, passes: int = 3) -> tuple[Tensor, float]:
    """Return a well-conditioned bfloat16 basis `(m, k)` of the span of `X (m, k)`; overwrites `X`.

    The second result estimates the least singular value of `X` with scaled columns: below `INDEPENDENT`, rounding hides
    some column in a combination of the others. The method is shifted CholeskyQR in float32, repeated up to `passes`
    times if columns stay nearly dependent, as for a fresh sketch. The shift is the 2-norm of the Gram matrix's
    rounding. If the shifted matrix has no Cholesky factor, Householder's QR in float32 is used.

    Args:
        X: `(m, k)`.
        passes: most passes; with 0, `X` is returned unchanged if its columns are nearly dependent.
    """
    k, first = X.shape[1], 0.0
    for index in range(max(passes, 1)):
        gram, norms = _normalized_(gram_of(X))
        gram.diagonal().add_((1 + torch.linalg.matrix_norm(gram) / k**0.5).mul_(2.0**-20))
        R, info = torch.linalg.cholesky_ex(gram)
        inverted = inverse(R.mT)
        failed, reached, shortest = torch.stack(
            [info.to(R.dtype), norm_estimate(inverted), R.diagonal().min()]
        ).tolist()
        if failed:
            return (torch.linalg.qr(X.float()).Q.to(X.dtype) if passes else X), first
        least = min(1 / reached, shortest)
        first = first if index else least
        if not passes and least < INDEPENDENT:
            break
        inverted.div_(norms[:, None])
        X = times_triangle_(X, inverted.to(X.dtype) if least > ROUGHER else inverted)
        if least > ROUGH:
            break
    return X, first


def deflate_(X: Tensor, leading: int) -> Tensor:
    """Return `X (m, k)`, bfloat16, with a basis in its first `leading` columns and the others orthogonal to them."""
    if leading:
        first, others = X[:, :leading], X[:, leading:]
        first.copy_(rough_basis_(first.clone())[0])
        others.sub_(first @ (first.mT @ others))
    return X


def gram_of(X: Tensor) -> Tensor:
    """Return `X^T X (k, k)` in float32 or better, where products of bfloat16 numbers are exact.

    (A GPU's tensor cores also multiply bfloat16 exactly, but their sums lose 1e-5, which hides nearly dependent
    columns.)
    """
    k = X.shape[1]
    if X.dtype != torch.bfloat16 and k < HALVED:
        return X.mT @ X
    G = torch.zeros(k, k, dtype=torch.promote_types(X.dtype, torch.float32), device=X.device)
    for rows in _panels(X) if X.dtype == torch.bfloat16 or X.is_cuda else [X]:
        add_gram_(G, rows.to(G.dtype).contiguous())  # a GPU multiplies float32 twice as fast by rows
    return mirrored_(G)


def add_gram_(G: Tensor, X: Tensor) -> None:
    """Add `X^T X` to `G (k, k)`; for a large one without the blocks below its diagonal, which `mirrored_` fills."""
    for block in _blocks(G):
        G[block, block.start :].addmm_(X[:, block].mT, X[:, block.start :])


def mirrored_(G: Tensor) -> Tensor:
    """Fill the blocks of `G` that `add_gram_` leaves out."""
    for block in _blocks(G):
        G[block.stop :, block] = G[block, block.stop :].mT
    return G


def _blocks(square: Tensor) -> Sequence[slice]:
    """Return groups of columns, between which the zero or known half of a square matrix is skipped."""
    k = len(square)
    count = min(max(2 * k // (HALVED_GPU if square.is_cuda else HALVED), 1), MOST_BLOCKS)
    return [slice(k * i // count, k * (i + 1) // count) for i in range(count)]


def _panels(X: Tensor) -> Sequence[Tensor]:
    """Split `X (m, k)` into panels of rows, so that temporary results use little memory."""
    rows = max(GPU_PANEL_BYTES // (4 * X.shape[1]), PANEL_ROWS) if X.is_cuda else PANEL_ROWS
    return torch.split(X, rows)


def times_triangle_(X: Tensor, R: Tensor) -> Tensor:
    """Return `X R (m, k)` for an upper triangular `R (k, k)`, computed in place, panel by panel."""
    if X.is_cuda and R.dtype != X.dtype:
        return _by_digits_(X, R)
    for panel in _panels(X):
        rows = panel.to(R.dtype)
        for block in reversed(_blocks(R)):  # none needs a column that was overwritten
            panel[:, block] = product(rows[:, : block.stop], R[: block.stop, block])
    return X


def _by_digits_(X: Tensor, R: Tensor) -> Tensor:
    """Return `X R (m, k)` of bfloat16 `X` and float32 `R` on tensor cores; two bfloat16 hold 16 digits of `R`."""
    head = R.to(X.dtype)
    tail = (R - head).to(X.dtype)
    for panel in _panels(X):
        found = torch.mm(head.mT, panel.mT, out_dtype=torch.float32)
        panel.copy_(found.add_(torch.mm(tail.mT, panel.mT, out_dtype=torch.float32)).mT)
    return X


def inverse(R: Tensor) -> Tensor:
    """Return the inverse of an upper triangular `R (k, k)` by halves: `k^3/3` flops, nearly all of them in products."""
    k = R.shape[0]
    if R.is_cuda and k >= BATCHED:
        return inverse_in_batches(R)
    if k <= LEAF or R.is_cuda:
        solved: Tensor = torch.linalg.solve_triangular(R, torch.eye(k, dtype=R.dtype, device=R.device), upper=True)
        return solved
    half = k // 2
    first, last = inverse(R[:half, :half]), inverse(R[half:, half:])
    result = torch.zeros_like(R)
    result[:half, :half], result[half:, half:] = first, last
    torch.mm(first, R[:half, half:] @ last, out=result[:half, half:])
    result[:half, half:].neg_()
    return result


def inverse_in_batches(R: Tensor) -> Tensor:
    """Return the same inverse with all halves of one size in a batch, which a GPU computes as fast as one."""
    k = R.shape[0]
    count = 1 << (-(-k // LEAF) - 1).bit_length()
    size = -(-k // count)
    padded = R
    if size * count > k:
        padded = torch.eye(size * count, dtype=R.dtype, device=R.device)
        padded[:k, :k] = R
    blocks = padded.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    identity = torch.eye(size, dtype=R.dtype, device=R.device).expand(count, size, size)
    found: Tensor = torch.linalg.solve_triangular(blocks, identity, upper=True)
    while len(found) > 1:
        first, last = found[::2], found[1::2]
        count, size = len(first), first.shape[-1]
        corners = padded.reshape(count, 2, size, count, 2, size)[:, 0, :, :, 1].diagonal(dim1=0, dim2=2).movedim(-1, 0)
        found = found.new_zeros(count, 2 * size, 2 * size)
        found[:, :size, :size], found[:, size:, size:] = first, last
        found[:, :size, size:] = -(first @ (corners @ last))
    return found[0, :k, :k]


def _each(X: Tensor) -> Tensor:
    """Orthonormalize a batch; only matrices that need it get a second pass or Householder's QR."""
    X = _scaled_(X)
    Q, shortest = _pass(X)
    bad = ~(shortest > 4 / _two_passes(X.dtype))  # NaN is bad
    again = (~bad & (shortest < 4 / ONE_PASS)).nonzero(as_tuple=True)
    if len(again[0]):
        Q[again], shortest = _pass(Q[again])
        bad[again] |= ~(shortest > 4 / _two_passes(X.dtype))
    bad |= ~torch.isfinite(Q.sum((-2, -1)))
    for index in bad.nonzero().tolist():
        Q[tuple(index)] = torch.linalg.qr(X[tuple(index)]).Q
    return Q


def _pass(X: Tensor) -> tuple[Tensor, Tensor]:
    """Do one pass of CholeskyQR for a batch `(..., m, k)`; return also the least diagonal entry of `R`, 0 without `R`.

    `|R^-1|` is at least the inverse of that entry, and rarely much larger.
    """
    R, info = torch.linalg.cholesky_ex(X.mT @ X, upper=True)
    shortest = torch.where(info == 0, R.diagonal(dim1=-2, dim2=-1).amin(-1), 0)
    return torch.linalg.solve_triangular(R, X, upper=True, left=False), shortest


def _scaled_(X: Tensor) -> Tensor:
    """Scale columns to norm 1 (a zero column stays)."""
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    return X.div_(norms.clamp_min(torch.finfo(X.dtype).tiny))


def _normalized_(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale a Gram matrix to a diagonal of 1; return also the column norms `(k,)`."""
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram.div_(norms).div_(norms[:, None]), norms


def _squared(norms: Tensor) -> bool:
    """Return whether float32 can hold the squares of these column norms beside each other."""
    return float(norms.min()) >= SMALLEST * float(norms.max())


def _factor(gram: Tensor, norms: Tensor) -> tuple[Tensor, float]:
    """Return `R^-1` with `R^T R = X^T X`, and an estimate of `|D R^-1|_2` (infinite without a factor `R`).

    While `R` is well-conditioned, the inverse is as accurate as triangular solves, and a product with it is faster.

    Args:
        gram: `X^T X (k, k)`, normalized.
        norms: `D`, the column norms `(k,)`.
    """
    R, info = torch.linalg.cholesky_ex(gram)
    inverted = inverse(R.mT)
    # All in one transfer, as each waits for the GPU.
    facts = torch.stack([info.to(R.dtype), norms.min(), norms.max(), norm_estimate(inverted)])
    failed, shortest, longest, reached = facts.tolist()
    if failed or shortest < SMALLEST * longest:
        return gram, math.inf
    return inverted.div_(norms[:, None]), reached


def norm_estimate(inverted: Tensor) -> Tensor:
    """Estimate `|R^-1|_2 ()` of the inverse `(k, k)` of an upper triangle from below, by a few power iterations."""
    norm = torch.linalg.vector_norm
    v = inverted[:, -1]  # start at the last column, as the smallest diagonal entries of R come last
    for _ in range(3):
        u = torch.mv(inverted.mT, v / norm(v))
        v = torch.mv(inverted, u)
    estimate: Tensor = norm(v) / norm(u)
    return estimate


def _two_passes(dtype: torch.dtype) -> float:
    """Return the `|R^-1|_2` up to which a second pass suffices; the first then leaves `|Q^T Q - I| < 0.01`."""
    return 0.1 / math.sqrt(torch.finfo(dtype).eps)
