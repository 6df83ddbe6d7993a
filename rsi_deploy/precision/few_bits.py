"""Store weights in few bits; onnxruntime unpacks them once, when it loads the model.

    codes --> Cast int32 --> Mul(multipliers) --> Reshape --> Cast --> int8 weight         of an int8 kernel
    int8 weight --> Cast --> Mul(scales) (--> Add(left @ right)) --> float weight          of a float kernel

All inputs of these nodes are constants, so that onnxruntime folds them: kernels, time and memory are those of int8 or
of float weights. Only the file is smaller. Codes of 4 bits are int4; those of 3 or 5 bits are the digits of a uint16.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rsi_deploy.calibration.repair import Repair
from rsi_deploy.calibration.rounding import CODES, Rounded

Array = npt.NDArray[Any]

OPSET = 21
"""First opset whose Cast knows int4."""
IR_VERSION = 10
DIGITS = {5: 3, 3: 5}
"""Bits -> codes in a uint16, which are its digits."""


def store_int8_weights_(model: ModelProto, weights: Mapping[str, Rounded]) -> list[str]:
    """Replace int8 initializers of a model that onnxruntime quantized by fewer bits.

    Args:
        model: quantized model of opset 21 or later; changed in place.
        weights: name of the float initializer -> its rounded form, in 4 or 3 bits.

    Returns:
        The names of the weights that the model holds as int8 per channel, and that were replaced.
    """
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = readers_of(model)
    nodes: list[NodeProto] = []
    replaced = []
    for name, rounded in weights.items():
        int8, scale = known.get(f"{name}_quantized"), known.get(f"{name}_scale")
        if int8 is None or scale is None or int8.data_type != TensorProto.INT8:
            continue
        if tuple(scale.dims) != (len(rounded.scales),):
            continue
        rounded = _with_biases_(rounded, scale, _biases(known, model, readers, int8.name))
        parts = _Unpacking(name=name)
        parts.int8_weight(rounded, tuple(int8.dims), _by_input(readers[int8.name][0]), int8.name)
        nodes += parts.nodes
        model.graph.initializer.remove(int8)
        model.graph.initializer.extend(parts.tensors)
        replaced.append(name)
    prepend(model, nodes)
    return replaced


def store_float_weights_(
    model: ModelProto,
    weights: Mapping[str, Rounded],
    rows_of: Callable[[str], Array],
    repairs: Mapping[str, Repair] = MappingProxyType({}),
) -> list[str]:
    """Replace float32 initializers by few bits, whose products stay those of float32.

    Args:
        model: of opset 21 or later, where a weight has fewer than 8 bits; changed in place.
        weights: name of the initializer -> its rounded form.
        rows_of: function from the name of an initializer to its numbers, `(..., out, in)`.
        repairs: name of the initializer -> low-rank part to add.

    Returns:
        The names of the weights that were replaced. One that is neither stored as its rows nor transposed stays.
    """
    nodes: list[NodeProto] = []
    replaced = []
    for tensor in list(model.graph.initializer):
        if tensor.name not in weights or tensor.data_type != TensorProto.FLOAT:
            continue
        rounded, values = weights[tensor.name], numpy_helper.to_array(tensor)
        rows = rows_of(tensor.name).reshape(rounded.codes.shape)
        is_rows = values.shape[0] == len(rows) and np.array_equal(values.reshape(rows.shape), rows)
        if not is_rows and not np.array_equal(values, rows.T):
            continue
        parts = _Unpacking(name=tensor.name)
        parts.float_weight(rounded, values.shape, not is_rows, tensor.name, repairs.get(tensor.name))
        nodes += parts.nodes
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(parts.tensors)
        replaced.append(tensor.name)
    prepend(model, nodes)
    return replaced


def readers_of(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Return value name -> nodes that read it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _biases(
    known: Mapping[str, TensorProto], model: ModelProto, readers: Mapping[str, list[NodeProto]], weight: str
) -> list[tuple[TensorProto, TensorProto]]:
    """Return the int32 bias and its scale of every product that an int8 weight enters as QDQ."""
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [
        product
        for reader in readers[weight]
        if reader.op_type == "DequantizeLinear"
        for product in readers.get(reader.output[0], ())
        if len(product.input) > 2
    ]
    biases = {product.input[2]: makers.get(product.input[2]) for product in products}
    return [
        (known[bias.input[0]], known[bias.input[1]])
        for bias in biases.values()
        if bias is not None and bias.op_type == "DequantizeLinear" and all(name in known for name in bias.input[:2])
    ]


def _with_biases_(rounded: Rounded, scale: TensorProto, biases: Sequence[tuple[TensorProto, TensorProto]]) -> Rounded:
    """Store the scales of a rounded weight, and round the int32 biases behind it again.

    The scale of a bias is that of the input times that of the weight: onnxruntime fuses nothing else.

    Returns:
        The rounded weight. Rows that are so small that the bias leaves int32 are zero, and keep onnxruntime's scale.
    """
    usual = numpy_helper.to_array(scale)
    scales = rounded.scales.numpy().astype(np.float32)
    values = [numpy_helper.to_array(codes) * numpy_helper.to_array(step).astype(np.float64) for codes, step in biases]
    steps = [numpy_helper.to_array(step).astype(np.float64) for _, step in biases]
    is_small = ~rounded.codes.numpy().any(axis=1)
    for value, step in zip(values, steps, strict=True):
        is_small |= np.abs(value) >= (2**31 - 1) * step * (scales / usual)
    scales = np.where(is_small, usual, scales)
    for (codes, stored), value, step in zip(biases, values, steps, strict=True):
        again = np.broadcast_to(step * (scales / usual), value.shape).astype(np.float32)
        codes.CopyFrom(numpy_helper.from_array(np.round(value / again).astype(np.int32), codes.name))
        stored.CopyFrom(numpy_helper.from_array(again, stored.name))
    scale.CopyFrom(numpy_helper.from_array(scales, scale.name))
    kept = torch.from_numpy(~is_small)[:, None]
    return replace(rounded, codes=rounded.codes * kept, scales=torch.from_numpy(scales))


def _by_input(reader: NodeProto) -> bool:
    """Return whether an int8 initializer is stored `(in, out)`, as a MatMul's, and not `(out, in)`."""
    if reader.op_type != "DequantizeLinear":
        return True
    return next((attribute.i for attribute in reader.attribute if attribute.name == "axis"), 1) == 1


@dataclass(frozen=True, kw_only=True)
class _Unpacking:
    """The nodes and constants that make a weight of its codes."""

    name: str
    nodes: list[NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)

    def float_weight(
        self, rounded: Rounded, dims: Sequence[int], by_input: bool, output: str, repair: Repair | None = None
    ) -> None:
        """Make a float32 weight."""
        if repair is None:
            self._scaled("", rounded, dims, by_input, output)
            return
        near = self._scaled("", rounded, dims, by_input)
        sides = ("right", "left") if by_input else ("left", "right")
        factors = [
            self._scaled(f"_{side}", factor, factor.codes.shape[:: -1 if by_input else 1], by_input)
            for side, factor in ((side, getattr(repair, side)) for side in sides)
        ]
        product = self._node("MatMul", *factors)
        if len(dims) != 2:
            product = self._node("Reshape", product, self._constant("dims", np.array(dims, np.int64)))
        self._node("Add", near, product, output=output)

    def _scaled(self, part: str, rounded: Rounded, dims: Sequence[int], by_input: bool, output: str = "") -> str:
        """Make a float32 matrix of an int8 one and the scales of its rows."""
        int8 = f"{self.name}{part}_int8"
        self.int8_weight(rounded, dims, by_input, int8)
        shape = (1, -1) if by_input else (-1, *[1] * (len(dims) - 1))
        scales = self._constant(f"{part}_row_scales", rounded.scales.numpy().astype(np.float32).reshape(shape))
        return self._node("Mul", self._node("Cast", int8, to=TensorProto.FLOAT), scales, output=output)

    def int8_weight(self, rounded: Rounded, dims: Sequence[int], by_input: bool, output: str) -> None:
        """Make an int8 weight `multipliers * codes`."""
        codes, multipliers = rounded.codes.numpy(), rounded.multipliers.numpy()
        (rows, columns), blocks = codes.shape, multipliers.shape[1]
        if rounded.bits == 8:
            stored = codes.T if by_input else codes
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(stored.reshape(dims)), output))
            return
        if blocks == 1:
            stored = codes.T if by_input else codes
            self._node("Cast", self._codes(stored.reshape(dims), rounded.bits), output=output, to=TensorProto.INT8)
            return
        codes, multipliers = codes.reshape(rows, blocks, columns // blocks), multipliers[:, :, None]
        if by_input:
            codes, multipliers = codes.transpose(1, 2, 0), multipliers.transpose(1, 2, 0)
        wide = self._int32(self._codes(codes, rounded.bits))
        self.tensors.append(_uint4(f"{self.name}_multipliers", multipliers))
        product = self._node("Mul", wide, self._int32(f"{self.name}_multipliers"))
        flat = self._node("Reshape", product, self._constant("shape", np.array(dims, np.int64)))
        self._node("Cast", flat, output=output, to=TensorProto.INT8)

    def _codes(self, codes: Array, bits: int) -> str:
        """Store codes, and return the name of their value, of an integer type."""
        if bits == 4:
            self.tensors.append(_int4(f"{self.name}_4bit", codes))
            return self.tensors[-1].name
        (lowest, highest), count = CODES[bits], DIGITS[bits]
        base = highest - lowest + 1
        digits = np.pad(codes.reshape(-1).astype(np.int64) - lowest, (0, -codes.size % count))
        places = base ** np.arange(count, dtype=np.int64)
        packed = self._constant(f"{bits}bit", (digits.reshape(-1, count) @ places).astype(np.uint16)[:, None])
        shifted = self._node("Div", self._int32(packed), self._constant("places", places.astype(np.int32)))
        digit = self._node("Mod", shifted, self._constant("base", np.array(base, np.int32)))
        code = self._node("Sub", digit, self._constant("middle", np.array(-lowest, np.int32)))
        flat = self._node("Reshape", code, self._constant("flat", np.array([-1], np.int64)))
        ends = [self._constant(end, np.array([at], np.int64)) for end, at in (("first", 0), ("end", codes.size))]
        cut = self._node("Slice", flat, *ends)
        return self._node("Reshape", cut, self._constant("code_shape", np.array(codes.shape, np.int64)))

    def _int32(self, value: str) -> str:
        return self._node("Cast", value, to=TensorProto.INT32)

    def _constant(self, part: str, values: Array) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(values), f"{self.name}_{part}"))
        return self.tensors[-1].name

    def _node(self, op_type: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{self.name}_unpack_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output or name], name, **attributes))
        return output or name


def prepend(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put nodes, whose inputs are constants, before all others."""
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])


def _int4(name: str, values: Array) -> TensorProto:
    packed = packed_pairs(values.reshape(1, -1).view(np.uint8) & 15)
    return helper.make_tensor(name, TensorProto.INT4, values.shape, packed.tobytes(), raw=True)


def _uint4(name: str, values: Array) -> TensorProto:
    packed = packed_pairs(np.ascontiguousarray(values, np.uint8).reshape(1, -1))
    return helper.make_tensor(name, TensorProto.UINT4, values.shape, packed.tobytes(), raw=True)


def packed_pairs(values: Array) -> Array:
    """Pack uint8 `(rows, n)` below 16 into bytes `(rows, ceil(n / 2))`, the first number in the low half."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed = values[:, 0::2] | (values[:, 1::2] << 4)
    return np.asarray(packed, np.uint8)
