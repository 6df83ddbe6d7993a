"""Low-rank layers: ordinary trainable modules that replace a dense one.

    LowRankLinear   y = left (right x) + bias
    LowRankConv     right: conv to `rank` channels per group; left: conv to `out`, with the bias. The form assigns the
                    axes of the kernel (with their stride, padding and dilation) to the two:
                    channel: k x k, 1 x 1    input: 1 x 1, k x k    separable: k x 1, 1 x k
    PivotedLinear   right computes `rank` of the outputs, the pivots, and left computes the others from them: the same
    PivotedConv     product in `rank * rank` fewer numbers per group. Outputs are reordered unless the pivots are the
                    first or the last rows

Each layer has a `weight` (the product `left @ right`), because some models read it outside of `forward`, for example
torchvision's Swin. Such a use is correct but not low-rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graph_passes.forms import Form, first_axes
from rsi_deploy.linalg.pivoting import PivotedFactors
from rsi_deploy.linalg.solver import Factors

Geometry = tuple[tuple[int, ...], str | tuple[int, ...], tuple[int, ...]]
"""Stride, padding and dilation of a convolution."""


class LowRankLinear(nn.Module):
    """`y = left @ (right @ x) + bias` for `x (..., in)`.

    Args:
        factors: `left (out, rank)` and `right (rank, in)`.
        bias: `(out,)` or None.
    """

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.left = _parameter(factors.left)
        self.right = _parameter(factors.right)
        self.bias = None if bias is None else _parameter(bias)
        self.out_features, self.rank = factors.left.shape
        self.in_features = factors.right.shape[1]

    @property
    def weight(self) -> Tensor:
        """The product `left @ right (out, in)`."""
        return self.left @ self.right

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(F.linear(input, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        """Return the description in `repr(module)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConv(nn.Module):
    """A 1-D, 2-D or 3-D convolution, with or without groups, as two convolutions.

    Args:
        conv: dense layer, whose geometry, padding mode and bias are kept.
        factors: `left (groups, out/groups * prod(second), rank)` and `right (groups, rank, in/groups * prod(first))`,
            where the form cuts the kernel into `(*first, *second)`.
        form: "channel", "input" or "separable".
        bias_change: change of the bias, `(out,)`; None to keep the same parameter.
    """

    def __init__(
        self,
        conv: "nn.modules.conv._ConvNd",
        factors: Factors,
        form: Form = "channel",
        *,
        bias_change: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.groups, _, self.rank = factors.left.shape
        self.form, self.kernel_size = form, conv.kernel_size
        axes = first_axes(form, len(conv.kernel_size))
        first, second = conv.kernel_size[: len(axes)], conv.kernel_size[len(axes) :]
        left = factors.left.reshape(-1, *second, self.rank).movedim(-1, 1)
        self.left = _parameter(left.reshape(*left.shape[:2], *(1 for _ in first), *second))
        self.right = _parameter(factors.right.reshape(self.groups * self.rank, -1, *first, *(1 for _ in second)))
        self.bias = changed_bias(conv.bias, bias_change)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._edges = conv._reversed_padding_repeated_twice
        self._first, self._second = _geometry(conv, axes), _geometry(conv, range(len(axes), len(conv.kernel_size)))
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel_size) - 1]

    @property
    def weight(self) -> Tensor:
        """The weight of the equivalent dense convolution, `(out, in/groups, *kernel)`."""
        channels, points = self.right.shape[1], self.left.shape[2:].numel()
        left = self.left.reshape(self.groups, -1, self.rank, points)
        right = self.right.reshape(self.groups, self.rank, channels, -1)
        product = torch.einsum("gors,grif->goifs", left, right)
        return product.reshape(-1, channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(N, in, *spatial)` to `(N, out, *spatial')`."""
        return self._convolve_left(self._convolve_right(input), self.bias)

    def _convolve_right(self, input: Tensor) -> Tensor:  # noqa: A002
        if self.padding_mode != "zeros":  # pad first, for any form; the convolutions then do not pad
            input = F.pad(input, self._edges, mode=self.padding_mode)  # noqa: A001
        stride, padding, dilation = self._first
        return self._convolve(input, self.right, None, stride, padding, dilation, self.groups)

    def _convolve_left(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = self._second
        return self._convolve(hidden, self.left, bias, stride, padding, dilation, self.groups)

    def extra_repr(self) -> str:
        """Return the description in `repr(module)`."""
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, groups={self.groups}" + ("" if self.form == "channel" else f", form={self.form}")
        )


class PivotOrder(nn.Module):
    """The order of the outputs of a pivoted layer. A state dict holds the pivots; the rest is computed from them.

    Args:
        pivots: int64 `(groups, rank)`, the rows of each group that are pivots.
        rows: rows of each group.
    """

    pivots: Tensor
    others: Tensor
    index: Tensor | None

    def __init__(self, pivots: Tensor, rows: int) -> None:
        super().__init__()
        self.rows = len(pivots) * rows
        start = torch.arange(len(pivots), device=pivots.device)[:, None] * rows
        self.register_buffer("pivots", (start + pivots).reshape(-1))
        self.register_buffer("others", None, persistent=False)
        self.register_buffer("index", None, persistent=False)
        self.arrange_()
        self.register_load_state_dict_post_hook(_arrange_)  # type: ignore[no-untyped-call]

    def arrange_(self) -> None:
        """Compute the other rows and the index; pivots that are the first or last rows need no index."""
        is_other = torch.ones(self.rows, dtype=torch.bool, device=self.pivots.device)
        is_other[self.pivots] = False
        self.others = is_other.nonzero().reshape(-1)
        self.others_first = bool(is_other[0])
        places = torch.cat((self.others, self.pivots) if self.others_first else (self.pivots, self.others))
        self.index = None if bool((places.diff() > 0).all()) else places.argsort()

    def join(self, pivots: Tensor, others: Tensor, dim: int) -> Tensor:
        """Return the values of all rows in their order from those of the pivots and of the other rows."""
        joined = torch.cat((others, pivots) if self.others_first else (pivots, others), dim)
        return joined if self.index is None else joined.index_select(dim, self.index)


def _arrange_(order: PivotOrder, _keys: object) -> None:
    order.arrange_()


class PivotedLinear(LowRankLinear):
    """A `LowRankLinear` whose first product computes `rank` of the outputs, and the second one the others from them.

    Args:
        factors: `left (1, out, rank)`, whose rows at `pivots (1, rank)` are the identity, and `right (1, rank, in)`.
        bias: `(out,)` or None.

    Raises:
        ValueError: the rows of `left` at the pivots are not the identity, or there are no other rows.
    """

    def __init__(self, factors: PivotedFactors, bias: Tensor | None) -> None:
        order, left = _other_rows(factors)
        super().__init__(Factors(left[0], factors.right[0]), bias)
        self.order, self.out_features = order, order.rows

    @property
    def weight(self) -> Tensor:
        """The weight of the equivalent dense layer, `(out, in)`."""
        return self.order.join(self.right, super().weight, 0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(..., in)` to `(..., out)`."""
        pivots = F.linear(input, self.right)
        if self.bias is None:
            return self.order.join(pivots, F.linear(pivots, self.left), -1)
        own = self.bias[self.order.pivots].to(pivots.dtype)
        return self.order.join(pivots + own, F.linear(pivots, self.left, self.bias[self.order.others]), -1)


class PivotedConv(LowRankConv):
    """A `LowRankConv` of the form "channel" whose first convolution computes `rank` of each group's outputs.

    Args:
        conv: dense layer, whose geometry, padding mode and bias are kept.
        factors: `left (groups, out/groups, rank)`, whose rows at `pivots (groups, rank)` are the identity, and
            `right (groups, rank, in/groups * prod(kernel))`.
        bias_change: change of the bias, `(out,)`; None to keep the same parameter.

    Raises:
        ValueError: the rows of `left` at the pivots are not the identity, or there are no other rows.
    """

    def __init__(
        self, conv: "nn.modules.conv._ConvNd", factors: PivotedFactors, *, bias_change: Tensor | None = None
    ) -> None:
        order, left = _other_rows(factors)
        super().__init__(conv, Factors(left, factors.right), "pivoted", bias_change=bias_change)
        self.order = order

    @property
    def weight(self) -> Tensor:
        """The weight of the equivalent dense convolution, `(out, in/groups, *kernel)`."""
        return self.order.join(self.right, super().weight, 0)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(N, in, *spatial)` to `(N, out, *spatial')`."""
        pivots, axes = self._convolve_right(input), len(self.kernel_size)
        if self.bias is None:
            return self.order.join(pivots, self._convolve_left(pivots, None), -1 - axes)
        own = self.bias[self.order.pivots].to(pivots.dtype).reshape(-1, *[1] * axes)
        others = self._convolve_left(pivots, self.bias[self.order.others])
        return self.order.join(pivots + own, others, -1 - axes)


class OpenMultiheadAttention(nn.Module):
    """An `nn.MultiheadAttention` that calls its layers `in_proj` and `out_proj`, so that hooks see them.

    Arguments and results are the same, with `attn_mask`, `key_padding_mask`, `need_weights`, `average_attn_weights`,
    `is_causal` and `batch_first`. The weights must be packed (`in_proj_weight`): separate q/k/v widths, `add_bias_kv`
    and `add_zero_attn` are not supported.

    Args:
        dense: module to replace; its parameters are shared.
    """

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = dense.embed_dim, dense.num_heads, dense.head_dim
        self.batch_first, self.dropout = dense.batch_first, dense.dropout
        self._qkv_same_embed_dim = False  # turns off the fused path of TransformerEncoderLayer for dense weights
        self._take_in_proj_(dense)
        self.out_proj = dense.out_proj
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False
        self.training = dense.training

    def _take_in_proj_(self, dense: nn.MultiheadAttention) -> None:
        weight, bias = dense.in_proj_weight, dense.in_proj_bias
        in_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        in_proj.weight, in_proj.bias = weight, bias
        self.in_proj: nn.Linear | PivotedLinear = in_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention as `nn.MultiheadAttention.forward` does."""
        if is_causal and attn_mask is None:  # is_causal is only a hint about the mask; torch refuses this, too
            raise RuntimeError("is_causal needs attn_mask beside it: pass the causal mask")
        batched = query.ndim == 3
        sequence_first = batched and not self.batch_first
        q, k, v = self._project(query, key, value)
        q, k, v = ((t.transpose(0, 1) if sequence_first else t if batched else t.unsqueeze(0)) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))  # type: ignore[no-untyped-call]
        bias = self._bias(q, k, attn_mask, key_padding_mask if batched else _unsqueeze(key_padding_mask))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.mT / self.head_dim**0.5
            weights = torch.softmax(scores if bias is None else scores + bias, dim=-1)
            weights = F.dropout(weights, dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out.transpose(0, 1) if sequence_first else out), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v `(..., embed)`. `in_proj` is called only if the three have the same input."""
        if query is key and key is value:
            projected: Tensor = self.in_proj(query)
            return projected.chunk(3, dim=-1)
        weight, bias = self.in_proj.weight.chunk(3), _chunk3(self.in_proj.bias)
        return tuple(F.linear(t, w, b) for t, w, b in zip((query, key, value), weight, bias, strict=True))

    def _bias(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Combine the two masks into an additive one, `(N or 1, heads or 1, length_q, length_k)`, or None."""
        bias: Tensor | None = None
        if attn_mask is not None:
            bias = _additive(attn_mask, q.dtype)
            bias = bias.unflatten(0, (-1, self.num_heads)) if bias.ndim == 3 else bias  # type: ignore[no-untyped-call]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


class LowRankMultiheadAttention(OpenMultiheadAttention):
    """An `OpenMultiheadAttention` whose packed input projection is low-rank. The output projection may be, too.

    Args:
        dense: module to replace.
        in_proj: factors of the packed weight `(3*embed, embed)`.
        bias_change: change of the bias of the input projection, `(3*embed,)`; None to keep the same parameter.
    """

    def __init__(self, dense: nn.MultiheadAttention, in_proj: Factors, *, bias_change: Tensor | None = None) -> None:
        super().__init__(dense)
        self.in_proj_left = _parameter(in_proj.left)
        self.in_proj_right = _parameter(in_proj.right)
        self.in_proj_bias = changed_bias(dense.in_proj_bias, bias_change)

    def _take_in_proj_(self, dense: nn.MultiheadAttention) -> None:
        """Do nothing: the dense projection is not kept."""

    @property
    def in_proj_weight(self) -> Tensor:
        """The product of the factors, `(3*embed, embed)`."""
        return self.in_proj_left @ self.in_proj_right

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v `(..., embed)`. `right` is applied once if the three have the same input."""
        left, bias = self.in_proj_left.chunk(3), _chunk3(self.in_proj_bias)
        if query is key and key is value:
            return F.linear(F.linear(query, self.in_proj_right), self.in_proj_left, self.in_proj_bias).chunk(3, dim=-1)
        return tuple(
            F.linear(F.linear(t, self.in_proj_right), weight, b)
            for t, weight, b in zip((query, key, value), left, bias, strict=True)
        )


class PivotedMultiheadAttention(OpenMultiheadAttention):
    """An `OpenMultiheadAttention` whose packed input projection is a `PivotedLinear`.

    If query, key and value are not one tensor, it multiplies by the product of the factors, which is not low-rank.

    Args:
        dense: module to replace.
        in_proj: factors of the packed weight, `left (1, 3*embed, rank)` and `right (1, rank, embed)`.
        bias_change: change of the bias of the input projection, `(3*embed,)`; None to keep the same parameter.
    """

    def __init__(
        self, dense: nn.MultiheadAttention, in_proj: PivotedFactors, *, bias_change: Tensor | None = None
    ) -> None:
        super().__init__(dense)
        self.in_proj = PivotedLinear(in_proj, changed_bias(dense.in_proj_bias, bias_change))

    def _take_in_proj_(self, dense: nn.MultiheadAttention) -> None:
        """Do nothing: the dense projection is not kept."""

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of the equivalent dense projection, `(3*embed, embed)`."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias of the projection, `(3*embed,)`."""
        return self.in_proj.bias


def changed_bias(bias: Tensor | None, change: Tensor | None) -> nn.Parameter | None:
    """Return `bias + change`. Either may be None; without a change, the same parameter is returned."""
    if change is None:
        return None if bias is None else _parameter(bias)
    if bias is None:
        return _parameter(change)
    return nn.Parameter((bias + change).detach().to(bias.dtype), requires_grad=bias.requires_grad)


def _other_rows(factors: PivotedFactors) -> tuple[PivotOrder, Tensor]:
    """Return the order of the rows, and the rows of `left` that are no pivots, `(groups, rows - rank, rank)`."""
    groups, rows, rank = factors.left.shape
    order, flat = PivotOrder(factors.pivots, rows), factors.left.reshape(-1, rank)
    identity = torch.eye(rank).to(flat).repeat(groups, 1)
    if rank == rows or not torch.equal(flat[order.pivots], identity):
        raise ValueError(f"expected the identity at {rank} of {rows} rows of left, and other rows beside them")
    return order, flat[order.others].reshape(groups, -1, rank)


def _geometry(conv: "nn.modules.conv._ConvNd", axes: range) -> Geometry:
    """Return the geometry of a convolution whose kernel is reduced to some axes."""

    def on(values: tuple[int, ...], nothing: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else nothing for axis, value in enumerate(values))

    padding: str | tuple[int, ...] = on((0,) * len(conv.kernel_size), 0)
    if axes and conv.padding_mode == "zeros":  # "same" and "valid" do not pad an axis with a kernel of 1
        padding = conv.padding if isinstance(conv.padding, str) else on(conv.padding, 0)
    return on(conv.stride, 1), padding, on(conv.dilation, 1)


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().contiguous())


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _unsqueeze(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.unsqueeze(0)


def _chunk3(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if bias is None else bias.chunk(3)
