"""Check a weight before it is factorized, and determine its scale.

Refused are integers, complex numbers, fewer than two dimensions, an empty dimension, NaN and infinite values. A rank
above `min(out, in)` is reduced to it. Very large and very small weights, including denormals, are scaled near 1 by a
power of two where their products are squared, so that nothing overflows or vanishes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import working_dtype

MODERATE = 10  # powers of two around 1 in which products of three weights and their squares are safe
ALIGNMENT = 64  # bytes; the alignment of a matrix may change the order in which a product is summed


class CheckedWeight(NamedTuple):
    """A weight ready for the kernel: `weight (..., out, in)`, contiguous and aligned, its `rank` and its `scale`.

    `scale` is the power of two, between 2^-126 and 2^126, that brings the largest entry nearest to 1; it is 1 if that
    entry is within a factor of a thousand of 1.
    """

    weight: Tensor
    rank: int
    scale: float


def check_weight(weight: Tensor, rank: int, site: str = "") -> CheckedWeight:
    """Return `weight (..., out, in)` in the form that the kernel needs.

    Raises:
        ValueError: The weight cannot be factorized; the message names the site, what came and what to pass.
    """
    what = f"{weight.dtype} {tuple(weight.shape)}"
    if not weight.is_floating_point():
        hint = "split it into real and imaginary parts" if weight.is_complex() else "pass weight.float()"
        raise ValueError(f"{site_prefix(site)}a weight must be real and floating, but got {what}; {hint}")
    if weight.ndim < 2:
        raise ValueError(f"{site_prefix(site)}a weight must be a matrix (..., out, in), but got {what}")
    if 0 in weight.shape:
        raise ValueError(f"{site_prefix(site)}a weight must have no empty dimension, but got {what}; exclude it")
    if rank < 1:
        raise ValueError(
            f"{site_prefix(site)}rank must be between 1 and min(out, in) = {min(weight.shape[-2:])}, but got {rank!r}"
        )
    weight = aligned(weight.detach())
    return CheckedWeight(weight, min(rank, *weight.shape[-2:]), _scale(weight, site))


def aligned(weight: Tensor) -> Tensor:
    """Return the same values contiguous and aligned, so that equal values give equal bytes."""
    weight = weight.contiguous()
    if weight.device.type == "cpu" and weight.data_ptr() % ALIGNMENT:
        weight = weight.clone()
    return weight


def site_prefix(site: str) -> str:
    """Return the beginning of a message about a site."""
    return f"site {site!r}: " if site else ""


def _scale(weight: Tensor, site: str) -> float:
    low, high = (float(end) for end in torch.aminmax(weight))  # NaN and infinity propagate
    largest = max(-low, high)
    if not math.isfinite(low + high):
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise ValueError(
                f"{site_prefix(site)}the weight has {bad} NaN or infinite values of {weight.numel()}; repair it or "
                "exclude it"
            )
    if largest == 0:
        return 1.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= MODERATE:
        return 1.0
    limit = 126 if working_dtype(weight) == torch.float32 else 1022
    return 2.0 ** min(max(-exponent, -limit), limit)
