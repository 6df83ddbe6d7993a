"""MACs of attention.

scores and mixture    batch * queries * keys * (heads * key width + heads * value width), heads those of the queries
projections           tokens * numbers in the packed weight, where the operator has one

Keys are the past ones and the new ones. A causal mask, padding, a local window and a cache that past and present share
count at full length. The width of the mixture is that of the output, which has the heads of the queries.
"""

import math

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator, Shape


def onnx_attention(node: ExecutedNode) -> Macs:
    """Count Attention of ONNX: q, k, v (batch, heads, length, size) or (batch, length, heads * size), past_key 4th."""
    query, key = node.input(0), node.input(1)
    past = node.find(4)
    batch, queries = query[0], query[-2]
    keys = key[-2] + (past[-2] if past is not None else 0)
    wide = math.prod(query) // max(batch * queries, 1) + node.output_size // max(batch * queries, 1)
    return Macs(attention=batch * queries * keys * wide)


def projected_attention(weights: tuple[int, ...], past: int) -> Formula:
    """Return the formula of an attention with one weight (in, q + k + v) or three, and a past (2, batch, heads, ...).

    Args:
        weights: Positions of the weights.
        past: Position of the past.
    """

    def count(node: ExecutedNode) -> Macs:
        batch, queries, _ = node.input(0)
        value_width = node.output[-1]
        query_width = (sum(node.input(position)[1] for position in weights) - value_width) // 2
        keys = _with_past(node, queries, node.find(past), 3)
        return Macs(
            product=batch * queries * sum(math.prod(node.input(position)) for position in weights),
            attention=batch * queries * keys * (query_width + value_width),
        )

    return count


def packed_attention(node: ExecutedNode) -> Macs:
    """Count PackedAttention: tokens without padding (tokens, in); `token_offset` is (batch, length) with padding."""
    (tokens, _), weight, value_width = node.input(0), node.input(1), node.output[-1]
    query_width = (weight[1] - value_width) // 2
    return Macs(
        product=tokens * math.prod(weight),
        attention=tokens * node.input(3)[1] * (query_width + value_width),
    )


def multi_head_attention(past: int, past_length: int) -> Formula:
    """Return the formula of an attention without projections; query, key and value may be packed into fewer inputs.

    Args:
        past: position of the past key (batch, heads, length, size).
        past_length: position of the input that is there where past and present share a buffer.
    """

    def count(node: ExecutedNode) -> Macs:
        query, key = node.input(0), node.find(1)
        batch, queries, value_width = query[0], query[1], node.output[-1]
        query_width = value_width
        if len(query) == 3:
            query_width = query[2] if key is not None else (query[2] - value_width) // 2
        new = queries if key is None else key[2] if len(key) == 4 else key[1]
        is_shared = node.find(past_length) is not None
        keys = _with_past(node, new, node.find(past), 2, is_shared=is_shared)
        return Macs(attention=batch * queries * keys * (query_width + value_width))

    return count


def packed_multi_head_attention(node: ExecutedNode) -> Macs:
    """Count PackedMultiHeadAttention: query (tokens, width) or packed (tokens, heads, 3, size)."""
    query, value_width = node.input(0), node.output[-1]
    query_width = query[1] if len(query) == 2 else value_width
    return Macs(attention=query[0] * node.input(4)[1] * (query_width + value_width))


def group_query_attention(node: ExecutedNode) -> Macs:
    """Count GroupQueryAttention: the output has the heads of the queries; packed or not, with a past or without."""
    batch, queries, width = node.output
    key, past = node.find(1), node.find(3)
    present = node.outputs[1] if len(node.outputs) > 1 else None
    if present is not None:
        keys = present[2]
    else:
        keys = (queries if key is None else key[-2]) + (past[2] if past is not None else 0)
    return Macs(attention=batch * queries * keys * 2 * width)


def linear_attention(node: ExecutedNode) -> Macs:
    """Count LinearAttention: a state (key size, value size) a head, written, read and, by the delta rules, read before.

    A token writes the state of each key head and reads it for each query head; "delta" and "gated_delta" read it once
    more a key head, to subtract what it holds.
    """
    query, value, attributes = node.input(0), node.input(2), node.attributes
    heads, key_heads = int(attributes["q_num_heads"]), int(attributes["kv_num_heads"])
    rule = attributes.get("update_rule", "gated_delta")
    is_delta = "delta" in (rule.decode() if isinstance(rule, bytes) else rule)
    state = (query[-1] // heads) * (value[-1] // key_heads)
    return Macs(attention=query[0] * query[1] * state * (heads + key_heads * (2 if is_delta else 1)))


def _with_past(node: ExecutedNode, new: int, past: Shape | None, axis: int, *, is_shared: bool = False) -> int:
    """Return the number of keys: the past and the new ones, or the whole buffer that both share."""
    if past is None:
        return new
    return past[axis] if is_shared or node.flag("past_present_share_buffer") else past[axis] + new


FORMULAS: dict[Operator, Formula] = {
    ("", "Attention"): onnx_attention,
    ("", "LinearAttention"): linear_attention,
    ("ai.onnx.preview", "FlexAttention"): onnx_attention,
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): multi_head_attention(past=5, past_length=7),
    ("com.microsoft", "DecoderMaskedSelfAttention"): projected_attention((1,), past=4),
    ("com.microsoft", "GroupQueryAttention"): group_query_attention,
    ("com.microsoft", "LinearAttention"): linear_attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention(past=6, past_length=8),
    ("com.microsoft", "PackedAttention"): packed_attention,
    ("com.microsoft", "PackedMultiHeadAttention"): packed_multi_head_attention,
    ("com.microsoft", "QAttention"): projected_attention((1,), past=8),
    ("com.microsoft", "QOrderedAttention"): projected_attention((5, 6, 7), past=18),
}
