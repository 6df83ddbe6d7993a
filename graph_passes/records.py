"""Sites, factors, and one record for every weight-bearing node.

    find_sites(model)  -> Site | Skip        what could be split, and what cannot and why
    factors(site)      -> Factors | Dense    the factors, which a caller of this package computes
    split(model, ...)  -> Split | Skip       what was done

One orientation everywhere: weight (groups, out, in) ~ left (groups, out, rank) @ right (groups, rank, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graph_passes.forms import FOLDED, kept_columns, unfold, unfolded_shape
from graph_passes.forms import Array as Array
from graph_passes.forms import Form as Form
from graph_passes.response import RowOrder
from graph_passes.window import Window

AnyForm: TypeAlias = Form | Literal["first"]
"""A form, or "first" for the first one of `Site.forms`."""

_FLOAT_DTYPES = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))


@dataclass(frozen=True, kw_only=True)
class Units:
    """The hidden units that a node reads, or the values of attention heads.

    Attributes:
        form: Form of the splits that remove some: "units" (`graph_passes.hidden_units`), or "heads"
            (`graph_passes.head_values`), where a unit is number i of every head.
        count: Number of units.
        run: Columns of the node's weight for each unit; in the form "heads" the number of heads.
        makers: Names of the weights of the products that make them.
        nodes: Names of the nodes that work on each of them: the products, then depthwise Convs, or the attention.
        numbers: How many numbers all nodes up to this one hold for each unit.
        beside: The same without the weights of the products.
    """

    form: Form = "units"
    count: int
    run: int
    makers: tuple[str, ...]
    nodes: tuple[str, ...]
    numbers: int
    beside: int


@dataclass(frozen=True, kw_only=True)
class Site:
    """One node that could be split.

    A site refers to its weight: the dense weight stays in memory as long as the site does.

    Attributes:
        node: Name of the node (of its first output where the node has none).
        op_type: "MatMul", "Gemm", "Conv", "ConvTranspose", or onnxruntime's "FusedMatMul", "Attention" and the like.
        weight: Name of the initializer or constant, such as "features.0.weight".
        out_features: Rows of the weight; for a Conv `out / groups`, for a ConvTranspose `out / groups * kh * kw`.
        in_features: Columns of the weight; for a Conv `in / groups * kh * kw`, for a ConvTranspose `in / groups`.
        groups: Number of matrices in the weight: the groups of a Conv, the batch entries of a MatMul; else 1.
        dtype: numpy name of the stored dtype: "float32", "float16", "bfloat16" or "float64".
        members: Names of the weights that a joint site stacks; empty for other sites.
        forms: Forms in which it can be split, the default first; `out_features` and `in_features` belong to that one.
        data: Name of the value that is multiplied.
        output: Name of the node's output; a fused operator has applied its activation or attention there.
        nested: Whether the node stands in a subgraph or a model function, whose values cannot be model outputs.
        row_order: The axes of the rows in data and output; None where the response (the output without bias,
            activation and attention) is neither `data @ weight^T` nor, with a window, an ordinary convolution.
        linear: Whether the output is the response plus a bias, with no activation or attention behind.
        window: How a convolution moves over the data; None for products.
        both_ways: Whether other nodes use the weight transposed.
        units: The hidden units that it reads; needed by the forms "units" and "heads".
    """

    node: str
    op_type: str
    weight: str
    out_features: int
    in_features: int
    groups: int
    dtype: str
    loader: Callable[[], Array] = field(repr=False, compare=False)
    members: tuple[str, ...] = ()
    forms: tuple[Form, ...] = ("matmul",)
    data: str = ""
    output: str = ""
    nested: bool = False
    row_order: RowOrder | None = None
    linear: bool = True
    window: Window | None = None
    both_ways: bool = False
    units: Units | None = None

    def load(self, form: AnyForm = "first") -> Array:
        """Return the weight, `(groups, *shape(form))` in its stored dtype.

        It is a view of the model's memory (or memory map) where the layout allows it: do not write into it.
        """
        weight, form = self.loader(), self.form_of(form)
        if form == self.forms[0] or self.window is None:
            return weight
        return unfold(weight.reshape(self.groups, self.out_features, -1, *self.window.kernel), form)

    def shape(self, form: AnyForm = "first") -> tuple[int, int]:
        """Return rows and columns of the weight in a form (per group).

        Raises:
            ValueError: When the site cannot take the form.
        """
        form = self.form_of(form)
        if form == self.forms[0] or self.window is None:
            return self.out_features, self.in_features
        kernel = self.window.kernel
        return unfolded_shape(self.out_features, self.in_features // math.prod(kernel), kernel, form)

    def form_of(self, form: AnyForm) -> Form:
        """Return the form itself; "first" stands for the default.

        Raises:
            ValueError: When the site cannot take the form.
        """
        for own in self.forms:
            if form in (own, "first"):
                return own
        where = f"{self.op_type} {self.node!r}, weight {self.weight!r}"
        raise ValueError(f"{where}: expected form {' or '.join(self.forms)}, but got {form!r}")

    @property
    def plain(self) -> bool:
        """Return whether a caller can compute the response from the data and the weight; see `row_order`."""
        return self.row_order is not None

    @property
    def bias_size(self) -> int:
        """Numbers in a bias of the node: one for each output channel or feature of all groups."""
        spread = math.prod(self.window.kernel) if self.window is not None and self.forms[0] == "input" else 1
        return self.groups * self.out_features // spread  # the rows of a ConvTranspose's weight are (out, *kernel)

    @property
    def break_even_rank(self) -> float:
        """The rank from which on the two factors hold at least as many numbers as the dense weight."""
        return self.out_features * self.in_features / (self.out_features + self.in_features)

    @property
    def full_rank(self) -> int:
        """The rank at which the factors can hold any weight of this shape."""
        return min(self.out_features, self.in_features)


@dataclass(frozen=True, kw_only=True)
class SplitFactors:
    """The two factors of one weight, in the dtype in which they are stored (that of `Site.load()`).

    Attributes:
        left: `(groups, rows, rank)`, with the rows and columns of `Site.shape(form)`.
        right: `(groups, rank, columns)`.
        form: Form of the matrix that they factorize, `Site.load(form)`.
        pivots: `(groups, rank)`, rows of `left` that are those of the identity, in order; needed by the form "pivoted".
        bias: `(Site.bias_size,)`, groups (of a batched product: batch entries) outermost. It is added to the output of
            every node that shares the weight, before an activation or the attention; None adds nothing.

    Raises:
        ValueError: When they do not fit together.

    Examples:
        >>> SplitFactors(left=np.ones((1, 6, 2)), right=np.ones((1, 2, 4))).rank
        2
    """

    left: Array
    right: Array
    form: AnyForm = "first"
    bias: Array | None = None
    pivots: Array | None = None

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        fits = left.ndim == right.ndim == 3 and left.shape[0] == right.shape[0] and left.shape[2] == right.shape[1]
        if not fits or self.rank < 1:
            raise ValueError(
                "expected left (groups, out, rank) and right (groups, rank, in) with rank >= 1, "
                f"but got left {left.shape} and right {right.shape}"
            )
        if left.dtype != right.dtype or left.dtype not in _FLOAT_DTYPES:
            raise ValueError(
                "expected both factors in one dtype of float16, bfloat16, float32, float64, "
                f"but got left {left.dtype} and right {right.dtype}"
            )
        if self.bias is not None and (self.bias.ndim != 1 or self.bias.dtype != left.dtype):
            raise ValueError(
                f"expected a bias with one axis in {left.dtype}, but got {self.bias.shape} in {self.bias.dtype}"
            )

        if (self.pivots is None) == (self.form == "pivoted"):
            raise ValueError(f"expected pivots with the form 'pivoted' and with no other one, but got {self.form!r}")
        if self.pivots is not None and not (
            self.pivots.shape == (left.shape[0], self.rank)
            and (np.take_along_axis(left, self.pivots[..., None], axis=1) == np.eye(self.rank)).all()
        ):
            raise ValueError(f"expected the rows of left at pivots ({left.shape[0]}, {self.rank}) to be the identity")

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return int(self.left.shape[-1])

    def transposed(self) -> SplitFactors:
        """Return the factors of the transposed weight, `(left @ right)^T = right^T @ left^T`, without a bias."""
        return SplitFactors(left=self.right.swapaxes(1, 2), right=self.left.swapaxes(1, 2))


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The answer of a factor source that leaves a site dense, with the reason."""

    reason: str


def drawn_factors(site: Site, form: Form, rank: int, draw: Callable[[tuple[int, ...]], Array]) -> SplitFactors:
    """Return factors and a bias of the size of a split, for a model whose time matters and not its numbers.

    Args:
        site: The site.
        form: Form of the split.
        rank: Rank of the split.
        draw: Returns numbers of a shape, in the stored dtype.
    """
    rows, columns = site.shape(form)
    left, right = draw((site.groups, rows, rank)), draw((site.groups, rank, columns))
    pivots = None
    if site.units is not None and form in FOLDED:
        right[:] = np.eye(columns)[kept_columns(form, rank, columns, site.units.run)]
    if form == "pivoted":  # the last rows: pivots in a run, which is what most exports have, need no Gather
        pivots = np.arange(rows - rank, rows)[None].repeat(site.groups, axis=0)
        left[:, rows - rank :] = np.eye(rank)
    return SplitFactors(left=left, right=right, form=form, bias=draw((site.bias_size,)), pivots=pivots)


FactorSource: TypeAlias = Callable[[Site], SplitFactors | Dense]

Keep: TypeAlias = Callable[[Array, str], ir.TensorProtocol]
"""A function that stores a factor under a name: in memory, or in a file, which frees the memory."""


def in_memory(array: Array, name: str) -> ir.TensorProtocol:
    """Keep a factor as a tensor in memory."""
    return ir.Tensor(array, name=name)


@dataclass(frozen=True, kw_only=True)
class Split:
    """The record of a node that became two.

    Attributes:
        node: Name of the dense node.
        op_type: Its operator.
        weight: Name of the weight that was split.
        out_features: Rows of the weight in its form (per group).
        in_features: Columns of the weight in its form (per group).
        groups: Number of matrices in the weight.
        rank: Inner dimension (per group).
        form: "matmul" (Attention too), "gemm", "channel", "input" or "separable" (Conv), "input" (ConvTranspose), or
            "pivoted" or "units" (MatMul, Gemm, Conv), or "heads" (MatMul, Gemm).
        first_node: Name of the new node that multiplies by `right`.
        second_node: Name of the new node that multiplies by `left`.
        joint: Names of all weights that share `right` and the first node in a joint split; else empty.
    """

    node: str
    op_type: str
    weight: str
    out_features: int
    in_features: int
    groups: int
    rank: int
    form: Form
    first_node: str
    second_node: str
    joint: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skip:
    """The record of a weight-bearing node that stays as it is, with the reason.

    Attributes:
        node: Name of the node.
        op_type: Its operator.
        reason: Why it stays, for the report.
        weight: Name of the weight; "" where no single one is known.
        out_features: Rows of the weight (per group); 0 where unknown.
        in_features: Columns of the weight (per group); 0 where unknown.
        groups: 0 where unknown.
    """

    node: str
    op_type: str
    reason: str
    weight: str = ""
    out_features: int = 0
    in_features: int = 0
    groups: int = 0


Record: TypeAlias = Split | Skip


@dataclass
class SplitResult(ir.passes.PassResult):
    """A pass result with its records, in graph order. (`ir.passes.Sequential` drops them: call the pass itself.)"""

    records: tuple[Record, ...] = ()
