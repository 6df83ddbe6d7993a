"""Operators of language models in torch, differentiable: attention with its rotary embeddings, and fused norms.

The values of `FUSED` compute the outputs of a node from its attributes and its inputs, see `operators`. All samples of
a batch have pasts of the same length.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsi_deploy.calibration.output_sensitivity import NoSensitivityError

Attributes = Mapping[str, Any]
Operator = Callable[..., Tensor | Sequence[Tensor]]
MICROSOFT = "com.microsoft"


def require(held: bool, what: str) -> None:
    """Raise `NoSensitivityError` for what is not known here, unless `held`."""
    if not held:
        raise NoSensitivityError(f"gradients do not pass {what}")


def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *more: Any) -> Tensor:
    plain = q.ndim == 4 and not a.get("softcap") and not any(t is not None for t in more) and k.shape[1] == q.shape[1]
    require(plain, "Attention with groups, softcap, a cache or 3-D inputs")
    causal = bool(a.get("is_causal", 0))
    require(mask is None or not causal, "Attention that is causal and masked")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=a.get("scale"))


def _grouped_attention(
    a: Attributes,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    lengths: Tensor,
    total: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *more: Any,
) -> Sequence[Tensor]:
    require(not a.get("softcap") and not any(t is not None for t in more), "GroupQueryAttention with softcap or a bias")
    heads, shared = a["num_heads"], a["kv_num_heads"]
    if k is None or v is None:
        size = q.shape[-1] // (heads + 2 * shared)
        q, k, v = torch.split(q, [heads * size, shared * size, shared * size], dim=-1)
    q, k, v = _heads(q, heads), _heads(k, shared), _heads(v, shared)
    past = 0 if past_k is None else past_k.shape[2]
    is_padded = int(total) != past + q.shape[2] or bool((lengths != lengths.max()).any())
    require(not past or not is_padded, "GroupQueryAttention with pasts of different lengths")
    at = torch.arange(past, past + q.shape[2])
    if a.get("do_rotary") and cos is not None and sin is not None:
        turned = bool(a.get("rotary_interleaved"))
        q, k = (_rotated(each, cos[at], sin[at], turned) for each in (q, k))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    window, mask = a.get("local_window_size", -1), None
    if past or 0 < window < q.shape[2]:
        seen = torch.arange(k.shape[2])
        mask = (seen <= at[:, None]) & (seen > at[:, None] - (window if window > 0 else len(seen)))
    keys, values = (each.repeat_interleave(heads // shared, dim=1) for each in (k, v))
    y = F.scaled_dot_product_attention(
        q, keys, values, attn_mask=mask, is_causal=mask is None, scale=a.get("scale") or None
    )
    return _rows(y), k, v


def _multi_head_attention(
    a: Attributes,
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    added: Tensor | None = None,
    *more: Any,
) -> Tensor:
    plain = k is not None and v is not None and k.ndim == v.ndim == 3 and not any(t is not None for t in more)
    require(plain, "MultiHeadAttention with packed inputs or a cache")
    assert k is not None
    assert v is not None
    heads = a["num_heads"]
    if bias is not None:
        parts = torch.split(bias, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = (each + part for each, part in zip((q, k, v), parts, strict=True))
    mask = added
    if padding is not None:
        require(padding.ndim == 2 and padding.shape == (q.shape[0], k.shape[1]), "MultiHeadAttention with lengths")
        hidden = torch.zeros(padding.shape).masked_fill(padding == 0, a.get("mask_filter_value", -10000.0))
        mask = hidden[:, None, None] if mask is None else mask + hidden[:, None, None]
    q, k, v = (_heads(each, heads) for each in (q, k, v))
    causal = bool(a.get("unidirectional"))
    require(mask is None or not causal, "MultiHeadAttention that is causal and masked")
    return _rows(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=a.get("scale") or None)
    )


def _rotary(a: Attributes, x: Tensor, at: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute com.microsoft's RotaryEmbedding."""
    require(not a.get("is_packed_batching") and a.get("scale", 1.0) == 1.0, "RotaryEmbedding that is scaled or packed")
    count = x.shape[-2]
    if at.numel() == 1:
        at = at.reshape(1, 1) + torch.arange(count)
    heads = a.get("num_heads", 0)
    require(x.ndim == 4 or bool(heads) or not a.get("rotary_embedding_dim"), "RotaryEmbedding without num_heads")
    size = 2 * cos.shape[-1]
    y = x if x.ndim == 4 else _heads(x, heads or x.shape[-1] // size)
    y = _rotated(y, cos[at][:, None], sin[at][:, None], bool(a.get("interleaved")))
    return y if x.ndim == 4 else _rows(y)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the planes of `x (batch, heads, positions, size)` by angles `(..., positions, planes)`."""
    turned, rest = torch.split(x, [2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        both = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        both = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([both, rest], dim=-1)


def _heads(x: Tensor, heads: int) -> Tensor:
    """Return rows `(batch, positions, heads * size)` as `(batch, heads, positions, size)`."""
    return x.reshape(*x.shape[:-1], heads, -1).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """Return heads side by side in rows."""
    return x.transpose(1, 2).flatten(2)


def _normalized(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = a.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    scale = scale.expand(shape)
    return F.layer_norm(x, shape, scale, None if bias is None else bias.expand(shape), a.get("epsilon", 1e-5))


def _scaled_by_rms(a: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    axis = a.get("axis", -1) % x.ndim
    return F.rms_norm(x, x.shape[axis:], scale.expand(x.shape[axis:]), a.get("epsilon", 1e-5))


def _skip(normalized: Callable[..., Tensor], operands: int) -> Operator:
    """Return the operator that normalizes a sum, and also returns the sum."""

    def call(a: Attributes, x: Tensor, skip: Tensor, *more: Tensor | None) -> Sequence[Tensor]:
        bias = more[operands] if len(more) > operands else None
        total = x + skip if bias is None else x + skip + bias
        return normalized({**a, "epsilon": a.get("epsilon", 1e-12)}, total, *more[:operands]), _NONE, _NONE, total

    return call


def _biased_gelu(approximate: str) -> Operator:
    def call(a: Attributes, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.gelu(x if bias is None else x + bias, approximate=approximate)

    return call


def _quick_gelu(a: Attributes, x: Tensor) -> Tensor:
    return x * torch.sigmoid(a.get("alpha", 1.702) * x)


_NONE = torch.empty(0)
"""Stands for outputs that only training reads."""

FUSED: Mapping[tuple[str, str], Operator] = {
    ("", "Attention"): _attention,
    ("", "LayerNormalization"): _normalized,
    ("", "RMSNormalization"): _scaled_by_rms,
    ("", "SimplifiedLayerNormalization"): _scaled_by_rms,
    (MICROSOFT, "BiasGelu"): _biased_gelu("none"),
    (MICROSOFT, "FastGelu"): _biased_gelu("tanh"),
    (MICROSOFT, "Gelu"): _biased_gelu("none"),
    (MICROSOFT, "GroupQueryAttention"): _grouped_attention,
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (MICROSOFT, "QuickGelu"): _quick_gelu,
    (MICROSOFT, "RotaryEmbedding"): _rotary,
    (MICROSOFT, "SkipLayerNormalization"): _skip(_normalized, 2),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip(_scaled_by_rms, 1),
}
"""(Domain, operator) -> what computes it."""
