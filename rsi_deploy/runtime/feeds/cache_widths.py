"""The width of caches whose last dimension an exporter left open, found at the attention that reads them.

onnxruntime-genai writes a past key as `(batch, heads, past, kv_cache_dim)`. Its width is that of the query's heads.
"""

from typing import Any

_HEADS = ("num_heads", "q_num_heads")
_KV_HEADS = ("kv_num_heads",)
_QUANTIZED = ("k_quant_type", "v_quant_type")
_SAME_WIDTH = ("Add", "Cast", "Identity", "RotaryEmbedding", "SimplifiedLayerNormalization")
_PRODUCTS = ("MatMul", "Gemm")


def cache_widths(proto: Any) -> dict[str, int]:
    """Return graph input -> width of a head, for inputs that an attention reads as past keys or values.

    Args:
        proto: `onnx.ModelProto`; its weights are not read.
    """
    graph = proto.graph
    inputs = {value.name for value in graph.input if value.name.startswith("past")}
    producers = {name: node for node in graph.node for name in node.output if name}
    found: dict[str, int] = {}
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        heads = next((int(attributes[name].i) for name in _HEADS if name in attributes), 0)
        pasts = [name for name in node.input if name in inputs]
        if not heads or not pasts or any(attributes[n].s not in (b"", b"NONE") for n in _QUANTIZED if n in attributes):
            continue
        if not node.input[1]:  # query, keys and values in one array
            heads += 2 * next((int(attributes[name].i) for name in _KV_HEADS if name in attributes), heads)
        columns = _columns(node.input[0], graph, producers)
        if columns is not None and columns % heads == 0:
            found |= dict.fromkeys(pasts, columns // heads)
    return found


def _columns(name: str, graph: Any, producers: dict[str, Any]) -> int | None:
    """Return the last dimension of a value, from its type or from the weight that makes it; None if unknown."""
    known: Any = next((value.type.tensor_type.shape.dim for value in graph.value_info if value.name == name), ())
    if len(known) == 3 and known[-1].dim_value > 0:
        return int(known[-1].dim_value)
    node = producers.get(name)
    if node is None:
        return None
    if node.op_type in _SAME_WIDTH:
        return _columns(node.input[0], graph, producers)
    if node.op_type == "MatMulNBits":
        return next((int(attribute.i) for attribute in node.attribute if attribute.name == "N"), None)
    if node.op_type not in _PRODUCTS:
        return None
    weight = next((tensor.dims for tensor in graph.initializer if tensor.name == node.input[1]), None)
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return None if weight is None else int(weight[0 if is_transposed else -1])
