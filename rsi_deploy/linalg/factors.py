"""A pair of factors, and the form in which it is stored."""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """`left (..., out, rank)` and `right (..., rank, in)`, in the dtype and on the device of the weight."""

    left: Tensor
    right: Tensor


def balanced(left: Tensor, right: Tensor) -> Factors:
    """Return the same product with the scale of each rank-one term shared evenly by its two vectors."""
    row = right.norm(dim=-1)
    column = left.norm(dim=-2)
    scale = torch.where((row > 0) & (column > 0), (row / column.clamp_min(1e-30)).sqrt(), torch.ones_like(row))
    return Factors(left * scale[..., None, :], right / scale[..., :, None])


def stored(left: Tensor, right: Tensor, dtype: torch.dtype) -> Factors:
    """Convert factors to `dtype`; 16-bit factors are balanced first, so that neither overflows nor underflows."""
    if dtype.itemsize < 4:
        left, right = balanced(left, right)
    return Factors(left.to(dtype), right.to(dtype))
