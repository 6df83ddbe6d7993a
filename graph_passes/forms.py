"""The forms of a split: the axes of a kernel that the first node takes, and the matrix that follows.

    form        first node   second node   matrix (rows, columns) of one group
    channel     *kernel      1, ..., 1     (out), (in, *kernel)
    input       1, ..., 1    *kernel       (out, *kernel), (in)
    separable   kh, 1        1, kw         (out, kw), (in, kh)

"matmul" and "gemm" are the forms of the products, which have no kernel: (out), (in).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Form: TypeAlias = Literal["matmul", "gemm", "channel", "input", "separable"]


def conv_forms(kernel: Sequence[int]) -> tuple[Form, ...]:
    """Return the forms of a Conv that differ from each other, the usual one first.

    Examples:
        >>> conv_forms((3, 3)), conv_forms((3, 1)), conv_forms((1, 1)), conv_forms((3, 3, 3))
        (('channel', 'input', 'separable'), ('channel', 'input'), ('channel',), ('channel', 'input'))
    """
    if math.prod(kernel) == 1:
        return ("channel",)
    return ("channel", "input", "separable") if len(kernel) == 2 and min(kernel) > 1 else ("channel", "input")


def first_axes(form: Form, axes: int) -> range:
    """Return the spatial axes of a Conv that belong to the first node; the others belong to the second."""
    return range({"input": 0, "separable": 1}.get(form, axes))


def unfolded_shape(out_channels: int, in_channels: int, kernel: Sequence[int], form: Form) -> tuple[int, int]:
    """Return rows and columns of the matrix of one group."""
    count = len(first_axes(form, len(kernel)))
    return out_channels * math.prod(kernel[count:]), in_channels * math.prod(kernel[:count])


def unfold(weight: Array, form: Form) -> Array:
    """Return the matrices that a form factorizes; a view where the layout allows it.

    Args:
        weight: `(groups, out, in, *kernel)`, out and in of one group.
        form: One of `conv_forms(kernel)`.

    Returns:
        `(groups, rows, columns)`.

    Examples:
        >>> import numpy as np
        >>> [unfold(np.zeros((2, 8, 3, 5, 7)), form).shape for form in ("channel", "input", "separable")]
        [(2, 8, 105), (2, 280, 3), (2, 56, 15)]
    """
    groups, out_channels, in_channels, *kernel = weight.shape
    count = len(first_axes(form, len(kernel)))
    first, second = range(3, 3 + count), range(3 + count, weight.ndim)
    shape = groups, *unfolded_shape(out_channels, in_channels, kernel, form)
    return weight.transpose(0, 1, *second, 2, *first).reshape(shape)
