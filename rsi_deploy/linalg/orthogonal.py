"""Orthonormal bases of tall blocks at the speed of matrix products: CholeskyQR, and what to do where it fails.

    D = diag(|x_1|, ..., |x_k|),  R^T R = (X D^-1)^T (X D^-1)  (Cholesky),  Q = X D^-1 R^-1

(Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020). One pass leaves `|Q^T Q - I| ~ eps |R^-1|^2`, which is
estimated from `R` (k^2 flops): where that is too much, a second pass follows (CholeskyQR2; of what is orthonormal but
for a little, the triangle's inverse is known without Cholesky); where Cholesky breaks down
the Gram matrix is shifted first (shifted CholeskyQR3); where that too leaves it ill-conditioned, as for a block of
lower rank than it has columns, Householder's QR, which cannot fail, is taken. The columns of an iterated block are
nearly orthogonal already and differ in scale: hence `D`, and one pass is the rule.

Between two power iterations a basis need only be well-conditioned: `rough_basis_` does one shifted pass in bfloat16.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rsi_deploy.linalg.products.gemm import product

# The |R^-1|_2 up to which one pass is enough: `|Q^T Q - I| <= 100 eps` at worst, a few eps as measured.
ONE_PASS = 10.0
# A second pass needs no Cholesky factor where `|Q^T Q - I|_F` is so many sqrt(eps): what is left is its square.
NEARLY = 3.0
# The least `1 / |D R^-1|` at which one pass over a bfloat16 block is enough, and one with `R^-1` in bfloat16 too.
ROUGH, ROUGHER = 0.003, 0.1
# The least `1 / |D R^-1|` at which roundings to bfloat16 of a block, about 1/500 each, leave every column told from a
# combination of the others: they then tilt the span by a few percent.
TOLD = 0.1
SHIFTED = 3
# From so many columns on, products with triangles and Gram matrices skip most of the half that is zero or known.
HALVED, HALVED_GPU = 384, 2048
MOST_BLOCKS = 4
# Sides of triangles that are solved at once, and from which on a GPU inverts those of one size together.
LEAF, BATCHED = 128, 1536
# Rows at a time; on a GPU, where each call costs, so many that they take these bytes.
PANEL_ROWS, GPU_PANEL_BYTES = 1024, 8 << 20
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
    gram = gram_of(Q)
    off = gram.clone()
    off.diagonal().sub_(1.0)
    if float(torch.linalg.matrix_norm(off)) <= NEARLY * math.sqrt(torch.finfo(Q.dtype).eps):
        # Of I + E the inverse of the triangle is I - (E's triangle, half its diagonal) - O(E^2).
        inverted = off.triu_().neg_()
        inverted.diagonal().mul_(0.5).add_(1.0)
        return times_triangle_(Q, inverted)
    inverted, reached = _factor(*_normalized_(gram))
    return times_triangle_(Q, inverted) if reached <= ONE_PASS else torch.linalg.qr(Q).Q


def near_basis_(X: Tensor) -> Tensor:
    """A basis `(m, k)` of the span of `X (m, k)`, float32 or float64, orthonormal to a percent; `X` is used up.

    Between two iterations nothing more is needed, and it takes one pass of CholeskyQR.
    """
    return _one_pass(X)[0]


def _one_pass(X: Tensor) -> tuple[Tensor, float]:
    """A basis of `X (m, k)` with `|Q^T Q - I| < 0.01`, and what `|D R^-1|` its last pass had; `X` is used up."""
    gram, norms = _normalized_(gram_of(X))
    inverted, reached = _factor(gram, norms)
    if reached <= _two_passes(X.dtype):
        return times_triangle_(X, inverted), reached
    Q = X.clone()  # Householder's needs the columns as they are
    if not _squared(norms):
        gram, norms = _normalized_(gram_of(_scaled_(Q)))
    for _ in range(SHIFTED):  # each takes a factor of some hundreds off the condition
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
    """`Q (m, k)`, orthonormal, and `R (k, k)` with `X = Q R`, float32 or float64; `X` is used up."""
    inverted, reached = _factor(*_normalized_(gram_of(X)))
    if reached <= ONE_PASS:
        return times_triangle_(X, inverted), inverse(inverted)
    Q = orthonormal_(X.clone())
    return Q, Q.mT @ X


def rough_basis_(X: Tensor, *, passes: int = 3) -> tuple[Tensor, float]:
    """A well-conditioned basis `(m, k)` of the span of `X (m, k)`, bfloat16, to its rounding; `X` is used up.

    With it comes about the least singular value that it had, columns scaled: below `TOLD`, some column could not be
    told from a combination of the others.

    Shifted CholeskyQR in float32, up to `passes` times where one leaves columns that nearly depend on others, as it may
    for a fresh sketch. The shift is the 2-norm that roundings of the Gram matrix reach. Where even so it has no factor,
    Householder's QR in float32.

    Args:
        X: `(m, k)`.
        passes: at most; with 0, `X` comes back as it is where its columns are not told apart.
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
        if not passes and least < TOLD:
            break
        inverted.div_(norms[:, None])
        X = times_triangle_(X, inverted.to(X.dtype) if least > ROUGHER else inverted)
        if least > ROUGH:
            break
    return X, first


def deflate_(X: Tensor, leading: int) -> Tensor:
    """`X (m, k)`, bfloat16, its first `leading` columns a basis and the others orthogonal to them."""
    if leading:
        first, others = X[:, :leading], X[:, leading:]
        first.copy_(rough_basis_(first.clone())[0])
        others.sub_(first @ (first.mT @ others))
    return X


def gram_of(X: Tensor) -> Tensor:
    """`X^T X (k, k)` in float32 or better: products in bfloat16 would round it, where float32 holds them exactly.

    (A GPU's tensor cores would multiply bfloat16 exactly too, and lose 1e-5 in the sums: columns that nearly depend on
    each other then hide.)
    """
    k = X.shape[1]
    if X.dtype != torch.bfloat16 and k < HALVED:
        return X.mT @ X
    G = torch.zeros(k, k, dtype=torch.promote_types(X.dtype, torch.float32), device=X.device)
    for rows in _panels(X) if X.dtype == torch.bfloat16 or X.is_cuda else [X]:
        add_gram_(G, rows.to(G.dtype).contiguous())  # a GPU multiplies float32 twice as fast by rows
    return mirrored_(G)


def add_gram_(G: Tensor, X: Tensor) -> None:
    """`G (k, k) += X^T X`; of a large one without the blocks below its diagonal, for `mirrored_` to fill."""
    for block in _blocks(G):
        G[block, block.start :].addmm_(X[:, block].mT, X[:, block.start :])


def mirrored_(G: Tensor) -> Tensor:
    """`G` with the blocks that `add_gram_` leaves out."""
    for block in _blocks(G):
        G[block.stop :, block] = G[block, block.stop :].mT
    return G


def _blocks(square: Tensor) -> Sequence[slice]:
    """Its columns some at a time: what is zero or known of a square is left out between them."""
    k = len(square)
    count = min(max(2 * k // (HALVED_GPU if square.is_cuda else HALVED), 1), MOST_BLOCKS)
    return [slice(k * i // count, k * (i + 1) // count) for i in range(count)]


def _panels(X: Tensor) -> Sequence[Tensor]:
    """`X (m, k)` some rows at a time: what is made of them then takes little memory."""
    rows = max(GPU_PANEL_BYTES // (4 * X.shape[1]), PANEL_ROWS) if X.is_cuda else PANEL_ROWS
    return torch.split(X, rows)


def times_triangle_(X: Tensor, R: Tensor) -> Tensor:
    """`X R (m, k)` for an upper triangular `R (k, k)`, in the place of `X`, some rows at a time."""
    if X.is_cuda and R.dtype != X.dtype:
        return _by_digits_(X, R)
    for panel in _panels(X):
        rows = panel.to(R.dtype)
        for block in reversed(_blocks(R)):  # none needs a column that was overwritten
            panel[:, block] = product(rows[:, : block.stop], R[: block.stop, block])
    return X


def _by_digits_(X: Tensor, R: Tensor) -> Tensor:
    """`X R (m, k)` of bfloat16 `X` and float32 `R` on a GPU's tensor cores: two bfloat16 hold 16 of R's digits."""
    head = R.to(X.dtype)
    tail = (R - head).to(X.dtype)
    for panel in _panels(X):
        found = torch.mm(head.mT, panel.mT, out_dtype=torch.float32)
        panel.copy_(found.add_(torch.mm(tail.mT, panel.mT, out_dtype=torch.float32)).mT)
    return X


def inverse(R: Tensor) -> Tensor:
    """The inverse of an upper triangular `R (k, k)`, by halves: `k^3/3` flops, nearly all of them in products."""
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
    """The same, all halves of one size at once: a GPU takes as long for one small block as for all."""
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
    """A batch: a second pass, and Householder's QR, for those that need them alone."""
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
    """One pass of CholeskyQR for each of a batch `(..., m, k)`, and the least of the diagonal of `R (...)`, 0 without.

    `|R^-1|` is at least its inverse, and rarely much more.
    """
    R, info = torch.linalg.cholesky_ex(X.mT @ X, upper=True)
    shortest = torch.where(info == 0, R.diagonal(dim1=-2, dim2=-1).amin(-1), 0)
    return torch.linalg.solve_triangular(R, X, upper=True, left=False), shortest


def _scaled_(X: Tensor) -> Tensor:
    """`X` with columns of norm 1 (a zero column stays)."""
    norms = torch.linalg.vector_norm(X, dim=-2, keepdim=True)
    return X.div_(norms.clamp_min(torch.finfo(X.dtype).tiny))


def _normalized_(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A Gram matrix with a diagonal of 1, and the column norms `(k,)` that were taken out of it."""
    norms = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    return gram.div_(norms).div_(norms[:, None]), norms


def _squared(norms: Tensor) -> bool:
    """Whether the squares of columns with these norms are numbers that float32 holds beside each other."""
    return float(norms.min()) >= SMALLEST * float(norms.max())


def _factor(gram: Tensor, norms: Tensor) -> tuple[Tensor, float]:
    """`R^-1` for the `R` with `R^T R = X^T X`, and an estimate of `|D R^-1|_2` (inf: no `R`, and no inverse).

    The inverse is as accurate as triangular solves while `R` is well-conditioned, and a product is faster than those.

    Args:
        gram: `X^T X (k, k)`, normalized.
        norms: `D`, the column norms `(k,)`.
    """
    R, info = torch.linalg.cholesky_ex(gram)
    inverted = inverse(R.mT)
    # At once: a GPU is waited for at each.
    facts = torch.stack([info.to(R.dtype), norms.min(), norms.max(), norm_estimate(inverted)])
    failed, shortest, longest, reached = facts.tolist()
    if failed or shortest < SMALLEST * longest:
        return gram, math.inf
    return inverted.div_(norms[:, None]), reached


def norm_estimate(inverted: Tensor) -> Tensor:
    """About `|R^-1|_2 ()` of an upper triangle's inverse `(k, k)`, from below: a few steps of power iteration."""
    norm = torch.linalg.vector_norm
    v = inverted[:, -1]  # from the last column: the smallest diagonal entries of R stand last
    for _ in range(3):
        u = torch.mv(inverted.mT, v / norm(v))
        v = torch.mv(inverted, u)
    estimate: Tensor = norm(v) / norm(u)
    return estimate


def _two_passes(dtype: torch.dtype) -> float:
    """The `|R^-1|_2` up to which a second pass mends the first: the first then leaves `|Q^T Q - I| < 0.01`."""
    return 0.1 / math.sqrt(torch.finfo(dtype).eps)
