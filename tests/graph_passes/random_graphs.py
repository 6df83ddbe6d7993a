"""Random models of every form: a chain of weight-bearing nodes, its weights wherever weights can sit.

x --> node --> Add? --> Relu? --> node --> ... --> y        in the main graph, an If branch or a model function
      weight: initializer | Constant, direct or behind layout operators

Each case knows how its nodes shall be split, and comes with the dense model that has the corrections as Adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from split_checks import full_rank, numbers

from graph_passes import Form, Site, SplitFactors
from graph_passes.forms import conv_forms
from graph_passes.records import AnyForm

HOMES = ("main", "if", "function")


@dataclass(frozen=True)
class Case:
    """A model, the same with every correction as an Add behind the dense node, and how its nodes are to be split."""

    proto: onnx.ModelProto
    reference: onnx.ModelProto
    data: tuple[int, ...]
    forms: dict[str, Form]
    corrections: dict[str, np.ndarray]

    def factors(self, site: Site) -> SplitFactors:
        """Exact ones in the form that was drawn, with the correction that was drawn."""
        form: AnyForm = self.forms.get(site.node, "first")
        correction = self.corrections.get(site.node)
        return full_rank(site, form, None if correction is None else correction.reshape(-1))


@dataclass
class Builder:
    """Nodes and weights made so far, and the shape of the data behind them."""

    draw: st.DrawFn
    opset: int
    home: str
    shape: tuple[int, ...]
    value: str = "x"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    sites: int = 0
    forms: dict[str, Form] = field(default_factory=dict)
    corrections: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, op_type: str, inputs: list[str], **attributes) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64), name)

    def constant(self, array: np.ndarray, name: str) -> str:
        self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
        return name

    def stored(self, array: np.ndarray) -> str:
        """The array as an initializer or a Constant."""
        name = f"w{len(self.weights)}_{len(self.nodes)}"
        if self.home == "function" or self.draw(st.booleans(), "as Constant"):
            return self.constant(array, name)
        self.weights[name] = array
        return name

    def weight(self, *shape: int) -> str:
        """A weight of this shape, behind any chain."""
        self.sites += 1
        array = numbers(*shape, seed=self.sites) / np.float32(np.sqrt(max(np.prod(shape[1:]), 1)))
        way = self.draw(st.sampled_from(["direct", "direct", "identity", "transpose", "reshape", "squeeze"]), "chain")
        if way == "identity":
            return self.node("Identity", [self.node("Identity", [self.stored(array)])])
        if way == "transpose":
            perm = self.draw(st.permutations(range(array.ndim)), "perm")
            stored = self.stored(np.ascontiguousarray(array.transpose(np.argsort(perm))))
            return self.node("Transpose", [stored], perm=perm)
        if way == "reshape" and self.opset >= 9:  # before, a Constant holds no integers
            stored = self.stored(array.reshape(-1, shape[-1]))
            return self.node("Reshape", [stored, self.integers(f"s{len(self.nodes)}", [*shape[:-1], -1])])
        if way == "squeeze":
            stored = self.stored(array[None])
            if self.opset < 13:
                return self.node("Squeeze", [stored], axes=[0])
            return self.node("Squeeze", [stored, self.integers(f"s{len(self.nodes)}", [0])])
        return self.stored(array)

    def size(self) -> int:
        return self.draw(st.integers(1, 5))

    def correct(self, *shape: int) -> None:
        """Draw a correction of the last node, in the shape in which an Add behind it takes it."""
        if self.draw(st.booleans(), "correction"):
            self.corrections[self.value] = numbers(*shape, seed=len(self.nodes))

    def add(self) -> None:
        """An Add of a constant, which may take a correction."""
        shape = [n if self.draw(st.booleans(), "broadcast") else 1 for n in self.shape]
        self.value = self.node("Add", [self.value, self.stored(numbers(*shape, seed=98))])

    def matmul(self) -> None:
        *batch, rows, columns = self.shape
        batch = batch if self.draw(st.booleans(), "batched") else []
        batch = [n if self.draw(st.booleans(), "broadcast") else 1 for n in batch]
        size = self.size()
        on_the_right = self.draw(st.booleans(), "on the right")
        if on_the_right:
            self.value = self.node("MatMul", [self.value, self.weight(*batch, columns, size)])
            self.shape, correction = (*self.shape[:-1], size), (*batch, 1, size)
        else:
            self.value = self.node("MatMul", [self.weight(*batch, size, rows), self.value])
            self.shape, correction = (*self.shape[:-2], size, columns), (*batch, size, 1)
        if self.home != "function" or (on_the_right and not batch):  # without shapes the others are not corrected
            self.correct(*correction)
        if self.draw(st.booleans(), "Add"):
            self.add()

    def gemm(self) -> None:
        rows, columns = self.shape
        trans_a, trans_b, size = *(self.draw(st.integers(0, 1)) for _ in range(2)), self.size()
        if trans_a:
            rows, columns = columns, rows
        attributes = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}
        if self.draw(st.booleans(), "weight is B"):
            weight = self.weight(*((size, columns) if trans_b else (columns, size)))
            inputs, self.shape, correction = [self.value, weight], (rows, size), (size,)
        else:  # the data is B
            rows, columns = self.shape[::-1] if trans_b else self.shape
            weight = self.weight(*((rows, size) if trans_a else (size, rows)))
            inputs, self.shape, correction = [weight, self.value], (size, columns), (size, 1)
        bias = self.draw(st.sampled_from([self.shape, self.shape[1:], (1,)]))
        addend = self.stored(numbers(*bias, seed=99))
        if self.draw(st.booleans(), "computed"):
            addend = self.node("Mul", [addend, self.node("ReduceMean", [self.value], keepdims=1)])
        self.value = self.node("Gemm", [*inputs, addend], **attributes)
        self.correct(*correction)

    def conv(self) -> None:
        _, channels, *space = self.shape
        groups = self.draw(st.sampled_from([g for g in (1, 2, 3, 4, 5) if channels % g == 0]))
        kernel = [self.draw(st.sampled_from([k for k in (2, 3, 1) if k <= n])) for n in space]
        out, stride = groups * self.draw(st.integers(1, 3)), self.draw(st.integers(1, 2))
        pad = self.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"]))
        attributes = {"group": groups, "strides": [stride] * len(space), "auto_pad": pad}
        weight = self.weight(out, channels // groups, *kernel)
        bias = [self.stored(numbers(out))] if self.draw(st.booleans(), "bias") else []
        self.value = self.node("Conv", [self.value, weight, *bias], **attributes)
        self.forms[self.value] = self.draw(st.sampled_from(conv_forms(kernel)[::-1]), "form")
        self.correct(out, *(1 for _ in space))
        same = pad.startswith("SAME")
        self.shape = (
            self.shape[0],
            out,
            *(-(-n // stride) if same else (n - k) // stride + 1 for n, k in zip(space, kernel, strict=True)),
        )

    def conv_transpose(self) -> None:
        _, channels, *space = self.shape
        groups = self.draw(st.sampled_from([g for g in (1, 2, 3, 4, 5) if channels % g == 0]))
        kernel, out = [self.draw(st.integers(1, 3)) for _ in space], self.draw(st.integers(1, 3))
        stride = self.draw(st.integers(1, 2))
        padding = self.draw(st.integers(0, stride - 1))
        attributes = {"group": groups, "strides": [stride] * len(space), "output_padding": [padding] * len(space)}
        weight = self.weight(channels, out, *kernel)
        self.value = self.node("ConvTranspose", [self.value, weight, self.stored(numbers(groups * out))], **attributes)
        self.correct(groups * out, *(1 for _ in space))
        grown = ((n - 1) * stride + k + padding for n, k in zip(space, kernel, strict=True))
        self.shape = (self.shape[0], groups * out, *grown)

    def corrected(self) -> list[onnx.NodeProto]:
        """The nodes, with every correction as an Add behind the node that it corrects."""
        nodes = []
        for node in self.nodes:
            correction = self.corrections.get(node.name)
            if correction is not None:
                copy = onnx.NodeProto.FromString(node.SerializeToString())
                copy.output[0] = f"{node.name}_dense"
                value = numpy_helper.from_array(correction, f"{node.name}_delta")
                nodes += [copy, helper.make_node("Constant", [], [value.name], value=value)]
                node = helper.make_node("Add", [copy.output[0], value.name], [node.name])
            nodes.append(node)
        return nodes

    def model(
        self, nodes: list[onnx.NodeProto], data: tuple[int, ...], ir_version: int, overridable: bool
    ) -> onnx.ModelProto:
        nodes = [*nodes, helper.make_node("Identity", [self.value], ["t"], "last")]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, data)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, self.shape)
        t = helper.make_tensor_value_info("t", TensorProto.FLOAT, self.shape)
        stored = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        opsets, functions, inner = [helper.make_opsetid("", self.opset)], [], []
        if self.home == "if":
            own = [] if ir_version < 4 or overridable else stored[::2]  # the others come from the outer scope
            inner, stored = own, [each for each in stored if each not in own]
            branches = {
                "then_branch": helper.make_graph(nodes, "then", [], [t], inner),
                "else_branch": helper.make_graph(
                    [helper.make_node("Constant", [], ["e"], value=numpy_helper.from_array(np.zeros(self.shape, "f")))],
                    "else",
                    [],
                    [helper.make_tensor_value_info("e", TensorProto.FLOAT, self.shape)],
                ),
            }
            one = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array(1, np.float32)))
            condition = helper.make_node("Cast", ["one"], ["c"], to=TensorProto.BOOL)
            nodes = [one, condition, helper.make_node("If", ["c"], ["y"], "if", **branches)]
        elif self.home == "function":
            functions = [helper.make_function("local", "f", ["x"], ["t"], nodes, list(opsets))]
            nodes = [helper.make_node("f", ["x"], ["y"], "call", domain="local")]
            opsets.append(helper.make_opsetid("local", 1))
        else:
            nodes[-1].output[0] = "y"
        inputs = [x]
        if ir_version < 4 or overridable:
            inputs += [helper.make_tensor_value_info(each.name, TensorProto.FLOAT, each.dims) for each in stored]
        graph = helper.make_graph(nodes, "g", inputs, [y], stored)
        return helper.make_model(graph, ir_version=ir_version, opset_imports=opsets, functions=functions)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A model with input `x`, and all that is known about it."""
    home = draw(st.sampled_from(HOMES))
    opset, ir_version = draw(st.sampled_from([(8, 3), (9, 4), (11, 6), (13, 7), (17, 8), (21, 10)]))
    if home == "function":
        opset, ir_version = max(opset, 13), max(ir_version, 8)
    data = tuple(draw(st.integers(1, 5)) for _ in range(draw(st.sampled_from([4, 2, 3]))))
    builder = Builder(draw, opset, home, data)
    for _ in range(draw(st.integers(1, 4))):
        kinds = [builder.matmul, builder.matmul]
        kinds += [builder.gemm] if len(data) == 2 else [builder.conv, builder.conv, builder.conv_transpose]
        draw(st.sampled_from(kinds))()
        if draw(st.booleans(), "Relu"):
            builder.value = builder.node("Relu", [builder.value])
    overridable = draw(st.booleans(), "overridable")
    model, reference = (
        builder.model(nodes, data, ir_version, overridable) for nodes in (builder.nodes, builder.corrected())
    )
    inferred = onnx.shape_inference.infer_shapes(model)
    return Case(inferred, reference, data, builder.forms, builder.corrections)
