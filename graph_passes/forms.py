"""The forms of a split: the axes of a kernel that the first node takes, and the matrix that follows.

    form        first node   second node   matrix (rows, columns) of one group
    channel     *kernel      1, ..., 1     (out), (in, *kernel)
    input       1, ..., 1    *kernel       (out, *kernel), (in)
    separable   kh, 1        1, kw         (out, kw), (in, kh)

"matmul" and "gemm" are the forms of the products, which have no kernel: (out), (in).

"pivoted" is the usual form of a product or of a Conv ("channel") in fewer numbers: the first node computes `rank` of
the outputs themselves, the pivots, and the second one the others from them (`graph_passes.pivoted`).

"units" keeps `rank` of the inputs that other nodes make, and removes the others (`graph_passes.hidden_units`). Its
matrix is that of "input"; the first node selects inputs, and goes. "heads" takes fewer numbers from each attention head
(`graph_passes.head_values`): the first node has a block for every head, and is multiplied into what makes the values.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Form: TypeAlias = Literal["matmul", "gemm", "channel", "input", "separable", "pivoted", "units", "heads"]

FOLDED: frozenset[str] = frozenset({"units", "heads"})
"""Forms whose first node is folded into the nodes before it, which become smaller."""
LEAST_SAVING = 0.1
"""Smallest share of the numbers that a pivoted split is to save."""


def conv_forms(kernel: Sequence[int]) -> tuple[Form, ...]:
    """Return the forms of a Conv that differ from each other, the usual one first.

    Examples:
        >>> conv_forms((3, 3)), conv_forms((3, 1)), conv_forms((1, 1)), conv_forms((3, 3, 3))
        (('channel', 'input', 'separable'), ('channel', 'input'), ('channel',), ('channel', 'input'))
    """
    if math.prod(kernel) == 1:
        return ("channel",)
    return ("channel", "input", "separable") if len(kernel) == 2 and min(kernel) > 1 else ("channel", "input")


def split_numbers(form: str, rows: int, columns: int, rank: int) -> int:
    """Return how many numbers the two factors of one group hold; without a first node that is folded.

    Examples:
        >>> split_numbers("gemm", 8, 6, 4), split_numbers("pivoted", 8, 6, 4)
        (56, 40)
    """
    return rank * rows if form in FOLDED else rank * (rows + columns - (rank if form == "pivoted" else 0))


def break_even_rank(form: str, rows: int, columns: int) -> float:
    """Return the rank from which on the factors hold at least as many numbers as the matrix.

    Examples:
        >>> break_even_rank("gemm", 8, 8), break_even_rank("pivoted", 8, 6)
        (4.0, 6.0)
    """
    if form in FOLDED:
        return float(columns)
    return float(min(rows, columns)) if form == "pivoted" else rows * columns / (rows + columns)


def rank_limit(form: str, rows: int, columns: int) -> float:
    """Return the rank from which on a split is not worth its nodes: the break-even rank, or a pivoted one's saving.

    A pivoted split saves at least a tenth of the numbers below it.

    Examples:
        >>> rank_limit("gemm", 8, 8), round(rank_limit("pivoted", 100, 100), 1)
        (4.0, 68.4)
    """
    if form != "pivoted":
        return break_even_rank(form, rows, columns)
    total = rows + columns
    return (total - math.sqrt(total * total - 4 * (1 - LEAST_SAVING) * rows * columns)) / 2


def largest_rank(form: str, rows: int, columns: int) -> int:
    """Return the largest rank of a split. The second node of a pivoted one computes at least one output."""
    if form in FOLDED:
        return columns
    return min(rows - 1, columns) if form == "pivoted" else min(rows, columns)


def kept_columns(form: str, rank: int, columns: int, run: int) -> Array:
    """Return the places of the first hidden units, or of the first numbers of every head: a selection of no data.

    Args:
        form: "units" or "heads".
        rank: Number of inputs that are left.
        columns: Number of inputs.
        run: Inputs of each unit, or number of heads.

    Examples:
        >>> kept_columns("units", 2, 6, 1), kept_columns("heads", 4, 6, 2)
        (array([0, 1]), array([0, 1, 3, 4]))
    """
    heads = run if form == "heads" else 1
    starts = np.arange(heads)[:, None] * (columns // heads)
    places: Array = (starts + np.arange(rank // heads)).reshape(-1)
    return places


def first_axes(form: Form, axes: int) -> range:
    """Return the spatial axes of a Conv that belong to the first node; the others belong to the second."""
    return range({"input": 0, "units": 0, "separable": 1}.get(form, axes))


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
