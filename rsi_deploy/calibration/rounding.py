"""Round a weight to few bits so that its response on calibration data changes least.

    W ~ s * m * k        k: integers of few bits       m: integers, one for a block of inputs       s: one for a row

`m * k` fits into eight bits, so a kernel for int8 weights computes with it, while few bits a number are stored: 4 (-8
to 7), 3.2 (-4 to 4, five numbers in two bytes; "3 bits"), or 5.33 (-19 to 19, three in two bytes; "5 bits").

The columns are rounded one after another, and each one's error is compensated by those that follow:

    min |(W - Q) X|^2,   H = E[x x^T] = U^-1 U^-T:    w_j -> q_j,    W[:, j+1:] -= (w_j - q_j) / U_jj * U[j, j+1:]

(Frantar et al., GPTQ, 2023; the steps are those of the optimal brain surgeon.) Rows that lie on such a grid already
stay as they are.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import Moments, Samples

CODES = {8: (-127, 127), 5: (-19, 19), 4: (-8, 7), 3: (-4, 4)}
"""Bits of a weight -> lowest and highest code."""
STORED_BITS = {8: 8.0, 5: 16 / 3, 4: 4.0, 3: 16 / 5}
"""Bits of a weight -> bits that a code takes in a file."""
LARGEST = {5: 127 // 19, 4: 127 // 8, 3: 15}
"""Bits of a weight -> largest multiplier of a block: its product with a code fits into int8, and it into four bits."""
DAMPING = 0.01
"""Ridge of H, in mean input variances."""
SAME = 1e-4
"""Distance from whole numbers below which a row lies on a grid, in steps."""
CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Shares of a row's largest number that are tried as the end of the grid."""
BLOCK = 16
"""Inputs of a product that share a multiplier. A convolution's rows have one scale each."""
ROW_BYTES = 9
"""Bytes of a row's scales (of weight and bias) and zero point."""
NODE_BYTES = {8: 0, 5: 400, 4: 120, 3: 400}
"""Bits of a weight -> bytes of the nodes and constants that unpack it, about."""
MOST_KEPT = 1 << 30
"""Largest number of bytes of the second moments that are kept."""
LAZY = 128
"""Number of columns after which their errors are passed on to all that follow."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight `scales * multipliers * codes`.

    Attributes:
        codes: int8 `(out, in)`, in the range of `CODES`.
        multipliers: int8 `(out, blocks)`, from 1 to 15; a single block of 1 where rows have one scale.
        scales: float32 `(out,)`, positive.
        block: number of inputs in a block.
        bits: key of `CODES`.
    """

    codes: Tensor
    multipliers: Tensor
    scales: Tensor
    block: int
    bits: int = 4

    def weight8(self) -> Tensor:
        """Return the numbers in eight bits, int8 `(out, in)`."""
        wide = self.multipliers.repeat_interleave(self.block, dim=1)[:, : self.codes.shape[1]]
        return self.codes * wide

    def weight(self) -> Tensor:
        """Return the rounded weight, float32 `(out, in)`."""
        return self.weight8().float() * self.scales[:, None]


def rounded(weight: Tensor, second: Tensor | None = None, *, block: int | None = None, bits: int = 4) -> Rounded:
    """Round a weight to few bits.

    A row keeps the nearest numbers where compensation makes its response error larger, which few inputs may.

    Args:
        weight: W `(out, in)`, floating.
        second: second moments of the inputs E[x x^T] `(in, in)`; None rounds every number to the nearest.
        block: number of inputs with a multiplier of their own; None for one scale a row.
        bits: key of `CODES`.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    W = weight.double()
    columns = W.shape[1]
    if second is not None and second.shape != (columns, columns):
        raise ValueError(f"second moments {tuple(second.shape)} do not fit a weight {tuple(W.shape)}")
    if not torch.isfinite(W).all():
        raise ValueError("the weight holds NaN or infinite values")
    block = min(block or columns, columns)
    nearest = _with_kept_rows(_rounded(W, None, block, bits), W)
    if second is None:
        return nearest
    second = second.double()
    if not torch.isfinite(second).all():
        raise ValueError("the second moments hold NaN or infinite values")
    if bool(((nearest.weight() - W).abs() < SAME * nearest.scales[:, None]).all()):
        return nearest
    fitted = _rounded(W, _root(second), block, bits)
    differences = (fitted.weight() - W, nearest.weight() - W)
    errors = [((difference @ second) * difference).sum(dim=1) for difference in differences]
    is_fitted = (errors[0] <= errors[1])[:, None]
    return replace(
        fitted,
        codes=torch.where(is_fitted, fitted.codes, nearest.codes),
        multipliers=torch.where(is_fitted, fitted.multipliers, nearest.multipliers),
        scales=torch.where(is_fitted[:, 0], fitted.scales, nearest.scales),
    )


def _rounded(
    weight: Tensor, root: Tensor | None, block: int, bits: int, steps: tuple[Tensor, bool] | None = None
) -> Rounded:
    """Round column by column; `root` compensates the errors, `steps` replace `_row_scales`."""
    W = weight.clone()
    rows, columns = W.shape
    scales, has_multipliers = steps or _row_scales(W, block, bits)
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    multipliers = torch.ones(rows, -(-columns // block), dtype=torch.int8)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        if has_multipliers:
            multipliers[:, start // block] = _multiplier(W[:, start:stop], scales, bits)
        step = scales * multipliers[:, start // block]
        for begin in range(start, stop, LAZY):
            end = min(begin + LAZY, stop)
            if root is None:
                codes[:, begin:end] = _nearest(W[:, begin:end], step[:, None], bits)
                continue
            errors = torch.zeros(rows, end - begin, dtype=W.dtype)
            for j in range(begin, end):
                codes[:, j] = _nearest(W[:, j], step, bits)
                error = (W[:, j] - codes[:, j] * step) / root[j, j]
                W[:, j:end] -= error[:, None] * root[j, j:end]
                errors[:, j - begin] = error
            W[:, end:] -= errors @ root[begin:end, end:]
    return Rounded(codes=codes, multipliers=multipliers, scales=scales.float(), block=block, bits=bits)


def _nearest(values: Tensor, step: Tensor, bits: int) -> Tensor:
    codes: Tensor = (values / step).round().clamp(*CODES[bits])
    return codes.to(torch.int8)


def _row_scales(W: Tensor, block: int, bits: int) -> tuple[Tensor, bool]:
    """Return the scale of every row, and True where its blocks have multipliers of their own."""
    largest, (_, highest) = W.abs().amax(dim=1).clamp_min(1e-30), CODES[bits]
    if block < W.shape[1]:
        return largest / (highest * LARGEST[bits]), True
    return _least_error(W, largest / highest, bits), False


def _with_kept_rows(near: Rounded, W: Tensor) -> Rounded:
    """Return the rounding with the rows that lie on a grid of these bits as they are."""
    has_multipliers = near.block < W.shape[1]
    lowest, highest = CODES[8 if has_multipliers else near.bits]
    largest, steps = W.abs().amax(dim=1).clamp_min(1e-30), torch.zeros(len(W), dtype=W.dtype)
    for count in range(max(-lowest, highest), 0, -1):
        rows = torch.arange(len(W))
        for part in (W[:, :BLOCK], W):  # the first columns rule out nearly all rows
            units = part[rows] * (count / largest[rows])[:, None]
            rows = rows[((units - units.round().clamp(lowest, highest)).abs() < SAME).all(dim=1)]
        steps[rows] = largest[rows] / count
    rows = steps.nonzero()[:, 0]
    if not len(rows):
        return near
    same = _rounded(W[rows], None, near.block, near.bits, (steps[rows], has_multipliers))
    is_same = ((same.weight() - W[rows]).abs() < SAME * steps[rows, None]).all(dim=1)
    for name in ("codes", "multipliers", "scales"):
        getattr(near, name)[rows[is_same]] = getattr(same, name)[is_same]
    return near


def _least_error(W: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return the clipped steps `(rows,)` with the least rounding error."""
    best, least = step, torch.full_like(step, torch.inf)
    for clip in CLIPS:
        tried = step * clip
        error = (W - _nearest(W, tried[:, None], bits) * tried[:, None]).square().sum(dim=1)
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _multiplier(W: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the integer multiplier `(rows,)` of a block with the least rounding error."""
    best, least = torch.ones(len(W), dtype=W.dtype), torch.full((len(W),), torch.inf, dtype=W.dtype)
    for tried in range(1, LARGEST[bits] + 1):
        step = (scales * tried)[:, None]
        error = (W - _nearest(W, step, bits) * step).square().sum(dim=1)
        best, least = torch.where(error < least, float(tried), best), torch.minimum(error, least)
    return best.to(torch.int8)


def _root(second: Tensor) -> Tensor:
    """Return U, upper triangular, with `(H + ridge)^-1 = U^T U`."""
    variances = second.diagonal()
    ridge = DAMPING * variances.mean().clamp_min(1e-30)
    regular = second + torch.diag(ridge.expand(len(second)))
    root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(regular)), upper=True)
    return root


def second_moments(moments: Moments | Samples, *, centred: bool = False) -> Tensor:
    """Return E[x x^T] of a site's inputs, about their mean if `centred`, float64 `(groups, in, in)`."""
    if isinstance(moments, Samples):
        x = moments.x.double()
        x = x - x.mean(dim=-2, keepdim=True) if centred else x
        return x.mT @ x / x.shape[-2]
    if centred:
        return moments.xx.double()
    mean = moments.mean_x.double()
    return moments.xx.double() + mean[:, :, None] * mean[:, None, :]


def keep_second_moments_(known: dict[str, Tensor], name: str, moments: Moments | Samples) -> None:
    """Add a site's second moments to `known` in float32, unless all together would take more than `MOST_KEPT`."""
    second_bytes = 4 * moments.mean_x.shape[0] * moments.mean_x.shape[1] ** 2
    if sum(tensor.nbytes for tensor in known.values()) + second_bytes <= MOST_KEPT:
        known[name] = second_moments(moments).float()


def rounded_weight(weight: Tensor, second: Tensor | None, *, is_product: bool, bits: int = 4) -> Rounded:
    """Round a weight `(groups, out, in)` to few bits, group by group; eight bits are rounded to the nearest.

    Args:
        weight: float32 weight.
        second: second moments `(groups, in, in)`; None rounds to the nearest.
        is_product: whether blocks of inputs have multipliers of their own, where they divide the inputs.
        bits: key of `CODES`.
    """
    if bits == 8:
        rows = weight.reshape(-1, weight.shape[-1])
        scales = rows.abs().amax(dim=1).clamp_min(1e-30) / CODES[8][1]
        ones = torch.ones(len(rows), 1, dtype=torch.int8)
        codes = _nearest(rows, scales[:, None], 8)
        return Rounded(codes=codes, multipliers=ones, scales=scales, block=rows.shape[1], bits=8)
    block = BLOCK if is_product and weight.shape[-1] % BLOCK == 0 else None
    parts = [
        rounded(weight[group], None if second is None else second[group], block=block, bits=bits)
        for group in range(len(weight))
    ]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        multipliers=torch.cat([part.multipliers for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
    )


def stored_bytes(numbers: int, rows: int, bits: int, *, is_product: bool) -> int:
    """Return the bytes that a weight takes in a file, with its scales.

    Args:
        numbers: numbers of the weight.
        rows: its outputs.
        bits: key of `CODES`.
        is_product: see `rounded_weight`.
    """
    multipliers = numbers / BLOCK / 2 if bits < 8 and is_product else 0
    return round(numbers * STORED_BITS[bits] / 8 + multipliers) + ROW_BYTES * rows + NODE_BYTES[bits]
