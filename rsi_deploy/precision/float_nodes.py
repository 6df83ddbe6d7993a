"""Keep the weights that a plan leaves in float out of onnxruntime's reach in a model of static int8.

    DequantizeLinear --> Conv(float weight)             the weight is rounded as the model is loaded
    DequantizeLinear --> Clip --> Conv(float weight)    the weight stays as it is

onnxruntime's `WeightBiasQuantization` rounds it to int8, with one scale for all outputs; so it does with the Gemm that
it makes of a MatMul and an Add. Some versions do so only where the output is quantized again. The Clip has the range of
the codes, so that it changes no number.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose float weights may be rounded."""


def stay_float_(model: ModelProto, names: Collection[str]) -> None:
    """Put a Clip between nodes and the DequantizeLinears that they read, in place.

    Args:
        model: model of static int8.
        names: nodes whose weights stay in float.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type in ROUNDED and node.name in names else None
        if maker is not None and maker.op_type == "DequantizeLinear" and len(maker.input) > 2:
            scale, zero = (numpy_helper.to_array(stored[name]) for name in maker.input[1:3])
            limits = ml_dtypes.iinfo(zero.dtype)  # type: ignore[no-untyped-call]
            inputs = [node.input[0]]
            for end, code in (("low", limits.min), ("high", limits.max)):
                inputs.append(f"{node.name}_{end}")
                bound = np.array((code - int(zero)) * scale, np.float32)
                model.graph.initializer.append(numpy_helper.from_array(bound, inputs[-1]))
            nodes.append(helper.make_node("Clip", inputs, [f"{node.name}_input"], f"{node.name}_clip"))
            node.input[0] = f"{node.name}_input"
        nodes.append(NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
