"""Sites whose weight and bias are inputs of the model, so that one model serves every replacement.

    data --> [ site ] --> y/plain --Add--> y
    weight ----^           bias ----^

The inputs are the product and the bias of a replacement: its two nodes compute the same, except for rounding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper

import graph_passes as gp
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.calibration.als import product_of
from rsi_deploy.core.arrays import as_numpy
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached

_DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True, kw_only=True)
class FedSite:
    """The nodes of one such site.

    Attributes:
        reached: the site.
        nodes: nodes that replace its own.
        dims: shape of the weight as it is stored.
        transposed: whether the weight is stored as `(..., in, out)`.
    """

    reached: Reached
    nodes: tuple[NodeProto, NodeProto]
    dims: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, r: Reached, node: NodeProto, model: ModelProto) -> "FedSite | None":
        """Return the site at `node`; None where it does more than multiply, or reads the weight in another layout."""
        tensor = next((t for t in model.graph.initializer if t.name == r.graph.weight), None)
        if tensor is None or list(node.input).count(tensor.name) != 1:
            return None
        splitter = gp.find_pass(node.domain, node.op_type)
        is_einsum = splitter is None or splitter.contraction is gp.Contraction.EINSUM  # stores its weight in any layout
        if is_einsum or not r.graph.linear or r.graph.dtype not in _DTYPES:
            return None
        output = node.output[0]
        site = NodeProto()
        site.CopyFrom(node)
        site.input[list(node.input).index(tensor.name)] = f"{r.tag}/weight"
        site.output[0] = f"{output}/plain"
        add = helper.make_node("Add", [site.output[0], f"{r.tag}/bias"], [output], name=f"{output}/add")
        is_product = not r.site.kernel
        transposed = is_product and not any(a.name == "transB" and a.i for a in node.attribute)
        return cls(reached=r, nodes=(site, add), dims=tuple(tensor.dims), transposed=transposed)

    def feeds(self, replacement: Replacement) -> Mapping[str, npt.NDArray[Any]]:
        """Return the inputs of a replacement."""
        site, tag = self.reached.site, self.reached.tag
        product = product_of(site, replacement)
        weight = as_numpy(product.mT if self.transposed else product).astype(self.reached.graph.dtype)
        bias = as_numpy(replacement.bias).astype(self.reached.graph.dtype)
        shape = (-1, *(1 for _ in site.kernel)) if site.kernel else (*self.dims[:-2], 1, math.prod(bias.shape[1:]))
        return {f"{tag}/weight": weight.reshape(self.dims), f"{tag}/bias": bias.reshape(shape)}
