"""Low-rank layers: ordinary trainable modules that replace a dense one, with the same numbers.

    LowRankLinear   y = left (right x) + bias
    LowRankConvNd   right: kxk conv to `rank` channels a group, with the stride, padding and dilation of the
                    original; left: 1x1 conv to `out`, with the bias ("channel" form)

Each still answers to `.weight` (the product `left @ right`), because some models reach past `forward` for it, as
torchvision's Swin does; such a use stays correct, only not low-rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsi_deploy.rsi import Factors


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
        """The dense equivalent `left @ right (out, in)`."""
        return self.left @ self.right

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(..., in)` to `(..., out)`."""
        return F.linear(F.linear(input, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        """What `repr(module)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConv(nn.Module):
    """The channel form of a 1-D, 2-D or 3-D convolution, groups included.

    Args:
        conv: the dense layer, whose geometry, padding mode and bias are taken over.
        factors: `left (groups, out/groups, rank)`, `right (groups, rank, in/groups*prod(kernel))`.
    """

    def __init__(self, conv: "nn.modules.conv._ConvNd", factors: Factors) -> None:
        super().__init__()
        self.groups, _, self.rank = factors.left.shape
        kernel = conv.weight.shape[2:]
        self.left = _parameter(factors.left.reshape(conv.out_channels, self.rank, *(1 for _ in kernel)))
        self.right = _parameter(factors.right.reshape(self.groups * self.rank, *conv.weight.shape[1:]))
        self.bias = conv.bias
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self._edges = conv._reversed_padding_repeated_twice
        self._convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]

    @property
    def weight(self) -> Tensor:
        """The dense equivalent `(out, in/groups, *kernel)`."""
        left = self.left.reshape(self.groups, -1, self.rank)
        right = self.right.reshape(self.groups, self.rank, -1)
        return (left @ right).reshape(self.out_channels, *self.right.shape[1:])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Map `(N, in, *spatial)` to `(N, out, *spatial')`."""
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._edges, mode=self.padding_mode), 0  # noqa: A001
        hidden = self._convolve(input, self.right, None, self.stride, padding, self.dilation, self.groups)
        return self._convolve(hidden, self.left, self.bias, groups=self.groups)

    def extra_repr(self) -> str:
        """What `repr(module)` shows."""
        return (
            f"{self.in_channels}, {self.out_channels}, rank={self.rank}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, groups={self.groups}"
        )


class LowRankMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` whose packed input projection (and output projection, where it pays) is low-rank.

    Same call, same results: `attn_mask`, `key_padding_mask`, `need_weights`, `average_attn_weights`, `is_causal`,
    `batch_first`. Made for the packed case (`in_proj_weight`); separate q/k/v widths, `add_bias_kv` and
    `add_zero_attn` stay dense.

    Args:
        dense: the module to replace.
        in_proj: factors of the packed `(3*embed, embed)` weight.
    """

    def __init__(self, dense: nn.MultiheadAttention, in_proj: Factors) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = dense.embed_dim, dense.num_heads, dense.head_dim
        self.batch_first, self.dropout = dense.batch_first, dense.dropout
        self._qkv_same_embed_dim = False  # keeps TransformerEncoderLayer off its fused path, which wants dense weights
        self.in_proj_left = _parameter(in_proj.left)
        self.in_proj_right = _parameter(in_proj.right)
        self.in_proj_bias = dense.in_proj_bias
        self.out_proj = dense.out_proj
        self.bias_k = self.bias_v = None
        self.add_zero_attn = False

    @property
    def in_proj_weight(self) -> Tensor:
        """The dense equivalent `(3*embed, embed)`."""
        return self.in_proj_left @ self.in_proj_right

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
        """As `nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:  # a hint about the mask, never one by itself; torch refuses it too
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
        """q, k, v `(..., embed)`; one pass of `right` where the three share their input."""
        left, bias = self.in_proj_left.chunk(3), _chunk3(self.in_proj_bias)
        if query is key and key is value:
            return F.linear(F.linear(query, self.in_proj_right), self.in_proj_left, self.in_proj_bias).chunk(3, dim=-1)
        return tuple(
            F.linear(F.linear(t, self.in_proj_right), weight, b)
            for t, weight, b in zip((query, key, value), left, bias, strict=True)
        )

    def _bias(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """The two masks as one additive `(N or 1, heads or 1, length_q, length_k)`, or None."""
        bias: Tensor | None = None
        if attn_mask is not None:
            bias = _additive(attn_mask, q.dtype)
            bias = bias.unflatten(0, (-1, self.num_heads)) if bias.ndim == 3 else bias  # type: ignore[no-untyped-call]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


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
