"""Keep the weights that a plan leaves in float out of onnxruntime's reach in a model of static int8.

    DequantizeLinear --> Conv(float weight)            onnxruntime rounds the weight to int8 as it loads the model
    DequantizeLinear --> Clip --> Conv(float weight)   the weight stays as it is

Its `WeightBiasQuantization` does so, with one scale for all outputs, for every Conv, ConvTranspose and Gemm whose input
is dequantized, also for a Gemm that it has made of a MatMul and an Add. The Clip has the range of the codes, so that it
changes no number.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

ROUNDED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


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
            ends = [np.float32((end - int(zero)) * scale) for end in (limits.min, limits.max)]
            bounds = [
                numpy_helper.from_array(end, f"{node.name}_{k}") for k, end in zip(("low", "high"), ends, strict=True)
            ]
            model.graph.initializer.extend(bounds)
            inputs = [node.input[0], *(bound.name for bound in bounds)]
            nodes.append(helper.make_node("Clip", inputs, [f"{node.name}_input"], f"{node.name}_clip"))
            node.input[0] = f"{node.name}_input"
        nodes.append(node)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
