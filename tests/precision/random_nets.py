"""Random small nets of convolutions and products, some of their weights split, and precisions to lower them to.

pictures: Conv --> Relu? --> MaxPool? --> + residual? --> ... --> mean or Flatten --> Gemm or MatMul --> ...
tokens:   Gather(table)? --> MatMul --> Add? --> Relu or Gelu? --> + residual? --> ... --> mean?
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import graph_passes as gp
from graph_passes.forms import conv_forms
from rsi_deploy.precision.lowering import Lowering
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, static

SAMPLES = 8


@dataclass(frozen=True)
class Case:
    """A float net with splits, the precision of its weights, and inputs."""

    proto: onnx.ModelProto
    lowering: Lowering
    feeds: dict[str, np.ndarray]


@dataclass
class Builder:
    """The nodes and weights so far, and the shape of the value behind them, without the batch."""

    draw: st.DrawFn
    rng: np.random.Generator
    shape: tuple[int, ...]
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)

    def node(self, op_type: str, inputs: list[str], name: str = "", **attributes) -> None:
        name = name or f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}.y"], name, **attributes))
        self.value = f"{name}.y"

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = array
        return name

    def weight(self, *shape: int, into: int) -> tuple[str, str]:
        """Return the names of a new site and of its weight."""
        site = f"site{len(self.sites)}"
        self.sites.append(site)
        array = self.rng.standard_normal(shape) * 1.5 / np.sqrt(into)
        return site, self.constant(f"{site}.weight", array.astype(np.float32))

    def bias(self, site: str, size: int) -> list[str]:
        if not self.draw(st.booleans(), "bias"):
            return []
        return [self.constant(f"{site}.bias", 0.3 * self.rng.standard_normal(size).astype(np.float32))]

    def conv(self) -> None:
        channels, *space = self.shape
        groups = self.draw(st.sampled_from([1, 1, 2] if channels % 2 == 0 else [1]), "groups")
        out = groups * self.draw(st.integers(2, 8), "out")
        kernel = self.draw(st.sampled_from([1, 3]), "kernel")
        stride, pad = self.draw(st.integers(1, 2), "stride"), kernel // 2
        site, weight = self.weight(out, channels // groups, kernel, kernel, into=channels // groups * kernel**2)
        attributes = {"group": groups, "strides": [stride] * 2, "pads": [pad] * 4}
        self.node("Conv", [self.value, weight, *self.bias(site, out)], site, **attributes)
        self.shape = (out, *((size + 2 * pad - kernel) // stride + 1 for size in space))

    def product(self) -> None:
        size, out = self.shape[-1], self.draw(st.integers(2, 24), "out")
        self.shape = (*self.shape[:-1], out)
        if len(self.shape) == 1 and self.draw(st.booleans(), "Gemm"):
            turned = self.draw(st.integers(0, 1), "transB")
            site, weight = self.weight(*((out, size) if turned else (size, out)), into=size)
            self.node("Gemm", [self.value, weight, *self.bias(site, out)], site, transB=turned)
            return
        site, weight = self.weight(size, out, into=size)
        self.node("MatMul", [self.value, weight], site)
        if bias := self.bias(site, out):
            self.node("Add", [self.value, *bias])

    def layer(self, make, *, is_last: bool) -> None:
        """A site, perhaps with what usually follows it; behind the last Relu of a small net almost all may be zero."""
        before = self.value, self.shape
        make()
        if is_last:
            return
        after = ["", "Relu", "Relu", "Sigmoid"] + (["Gelu"] if make == self.product else ["MaxPool"])
        operator = self.draw(st.sampled_from(after), "after")
        if operator == "MaxPool":
            self.node("MaxPool", [self.value], kernel_shape=[3, 3], pads=[1] * 4)
        elif operator:
            self.node(operator, [self.value])
        if self.shape == before[1] and self.draw(st.booleans(), "residual"):
            self.node("Add", [self.value, before[0]])


def _pictures(build: Builder) -> None:
    convolutions, products = build.draw(st.integers(1, 3), "convolutions"), build.draw(st.integers(0, 2), "products")
    for left in reversed(range(convolutions)):
        build.layer(build.conv, is_last=left + products == 0)
    if build.draw(st.booleans(), "mean"):
        build.node("GlobalAveragePool", [build.value])
        build.shape = (build.shape[0], 1, 1)
    build.node("Flatten", [build.value])
    build.shape = (int(np.prod(build.shape)),)
    for left in reversed(range(products)):
        build.layer(build.product, is_last=left == 0)


def _tokens(build: Builder) -> None:
    for left in reversed(range(build.draw(st.integers(1, 3), "products"))):
        build.layer(build.product, is_last=left == 0)
    if build.draw(st.booleans(), "mean"):
        build.node("ReduceMean", [build.value, build.constant("axis", np.array([1]))], keepdims=0)
        build.shape = build.shape[1:]


def _split(draw: st.DrawFn, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Split some of the weights to a random rank."""

    def source(site: gp.Site) -> gp.SplitFactors | gp.Dense:
        if not draw(st.booleans(), "split"):
            return gp.Dense(reason="drawn")
        kernel = [] if site.window is None else list(site.window.kernel)
        form = draw(st.sampled_from(conv_forms(kernel)), "form") if kernel else "first"
        weight = site.load(form).astype(np.float64)
        rank = draw(st.integers(1, min(weight.shape[1:])), "rank")
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        left, right = u[..., :rank] * s[:, None, :rank], vt[:, :rank]
        return gp.SplitFactors(left=left.astype(np.float32), right=right.astype(np.float32), form=form)

    model = ir.from_proto(proto)
    gp.split(model, source)
    return ir.to_proto(model)


@st.composite
def cases(draw) -> Case:
    """Nets that may be lowered, with their precision."""
    seed = draw(st.integers(0, 2**16), "seed")
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["pictures", "tokens", "table"]), "kind")
    if kind == "pictures":
        shape = (
            draw(st.integers(1, 4), "channels"),
            draw(st.integers(4, 8), "height"),
            draw(st.integers(4, 8), "width"),
        )
    else:
        shape = (draw(st.integers(1, 6), "tokens"), 32 if kind == "table" else draw(st.integers(4, 24), "width"))
    build = Builder(draw, rng, shape)
    data = rng.standard_normal((SAMPLES, *shape)).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
    if kind == "table":
        data = rng.integers(0, 150, (SAMPLES, shape[0]))
        x = helper.make_tensor_value_info("x", TensorProto.INT64, ["N", shape[0]])
        build.node("Gather", [build.constant("table", rng.standard_normal((150, 32)).astype(np.float32)), "x"], "embed")
    (_pictures if kind == "pictures" else _tokens)(build)
    y = helper.make_tensor_value_info(build.value, TensorProto.FLOAT, ["N", *build.shape])
    stored = [numpy_helper.from_array(array, name) for name, array in build.weights.items()]
    graph = helper.make_graph(build.nodes, "g", [x], [y], stored)
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(proto, full_check=True)
    bits = {site: draw(st.sampled_from([3, 4, 4, 5, 8, 8, 32]), f"bits of {site}") for site in build.sites}
    scheme = draw(st.sampled_from([static("minmax"), static("minmax"), DYNAMIC, FEW_BITS]), "scheme")
    in_float = frozenset(site for site in build.sites if draw(st.booleans(), f"{site} in float"))
    tables = {"table": draw(st.sampled_from([4, 8, 32]), "bits of the table")} if kind == "table" else {}
    lowering = Lowering(
        scheme=scheme, bits={site: n for site, n in bits.items() if n != 8}, tables=tables, in_float=in_float
    )
    return Case(_split(draw, proto), lowering, {"x": data})
