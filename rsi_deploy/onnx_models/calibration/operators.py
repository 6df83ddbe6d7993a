"""ONNX operators in torch, differentiable: those that may stand between a site and the output.

Floating values are float32. An operator or a setting that is not here is refused by name. The meaning is that of opset
13 and later. An operator with a split pass names its arithmetic there (`graph_passes.Contraction`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibration.output_sensitivity import NoSensitivityError
from rsi_deploy.onnx_models.calibration.fused_operators import FUSED, Attributes, Operator, require

FIRST_OPSET = 13


def operator(node: NodeProto) -> Callable[..., Sequence[Tensor]]:
    """Return a function that computes the outputs of a node from its inputs (None for one that is left out).

    Raises:
        NoSensitivityError: the operator is not known here; a call also raises it for an unknown setting.
    """
    splitter = gp.find_pass(node.domain, node.op_type)
    known: Operator | None = None
    if splitter is not None and splitter.contraction is not None:
        known = _CONTRACTIONS[splitter.contraction]
    else:
        domain = "" if node.domain == "ai.onnx" else node.domain
        known = FUSED.get((domain, node.op_type)) or (None if domain else _OPERATORS.get(node.op_type))
    if known is None:
        raise NoSensitivityError(f"gradients do not pass {node.op_type} (node {node.name!r})")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    count = sum(bool(name) for name in node.output)

    def call(*inputs: Tensor | None) -> Sequence[Tensor]:
        made = known(attributes, *inputs)
        made = [made] if isinstance(made, Tensor) else made
        require(len(made) >= count, f"a second output of {node.op_type} (node {node.name!r})")
        return made

    return call


def _ints(value: Tensor) -> list[int]:
    return [int(n) for n in value.reshape(-1)]


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    axes = w.ndim - 2
    require(axes in (1, 2, 3) and a.get("auto_pad", b"NOTSET") == b"NOTSET", "Conv with auto_pad")
    strides, dilations = a.get("strides", [1] * axes), a.get("dilations", [1] * axes)
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    pads = a.get("pads", [0] * 2 * axes)
    begins = pads[:axes]
    if begins != pads[axes:]:
        x, begins = _padded(x, a, axes, 0.0), [0] * axes
    if axes == 2:  # twice as fast on a CPU, forward and backward
        x = x.contiguous(memory_format=torch.channels_last)
    return conv(x, w, b, stride=strides, padding=begins, dilation=dilations, groups=a.get("group", 1))


def _padded(x: Tensor, a: Attributes, axes: int, value: float) -> Tensor:
    pads = a.get("pads", [0] * 2 * axes)
    return F.pad(x, [p for axis in reversed(range(axes)) for p in (pads[axis], pads[axis + axes])], value=value)


def _pool(a: Attributes, x: Tensor, pool: Callable[..., Tensor], value: float) -> Tensor:
    axes = x.ndim - 2
    plain = axes == 2 and not a.get("ceil_mode") and a.get("auto_pad", b"NOTSET") == b"NOTSET"
    plain = plain and set(a.get("dilations", [1])) == {1}
    require(plain and (value != 0 or not any(a.get("pads", [])) or bool(a.get("count_include_pad"))), "a pool")
    return pool(_padded(x, a, axes, value), a["kernel_shape"], a.get("strides", [1] * axes))


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x, w = (x.mT if a.get("transA") else x), (w.mT if a.get("transB") else w)
    y: Tensor = float(a.get("alpha", 1.0)) * (x @ w)
    return y if b is None else y + float(a.get("beta", 1.0)) * b


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        require(not a.get("noop_with_empty_axes"), "a reduction of no axes")
        over = a.get("axes") or (_ints(axes) if axes is not None else None) or list(range(x.ndim))
        return reduce(x, dim=over, keepdim=bool(a.get("keepdims", 1)))

    return call


def _reshaped(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _ints(shape)
    return x.reshape([x.shape[i] if not n and not a.get("allowzero") else n for i, n in enumerate(sizes)])


def _expanded(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x + x.new_zeros(_ints(shape))


def _sliced(a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = _ints(starts), _ints(ends)
    over = range(len(first)) if axes is None else _ints(axes)
    by = [1] * len(first) if steps is None else _ints(steps)
    require(min(by) > 0, "Slice with a negative step")
    at = [slice(None)] * x.ndim
    for axis, begin, end, step in zip(over, first, last, by, strict=True):
        at[axis] = slice(begin, end, step)
    return x[tuple(at)]


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    require(a.get("mode", b"constant") == b"constant" and axes is None, "Pad with a mode or axes")
    return _padded(x, {"pads": _ints(pads)}, x.ndim, 0.0 if value is None else float(value))


def _clipped(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is None or high is None:
        return x if low is high else torch.clamp(x, low, high)
    if x.is_floating_point() and not (low.requires_grad or high.requires_grad) and bool(low <= high):
        return F.hardtanh(x, float(low), float(high))  # its gradients take a tenth of the time
    return torch.clamp(x, low, high)


def _turned(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm") or list(reversed(range(x.ndim))))


def _flat(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _cast(a: Attributes, x: Tensor) -> Tensor:
    to = a["to"]
    if to in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        return x.float()
    kinds = {TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool}
    require(to in kinds, f"Cast to {TensorProto.DataType.Name(to)}")
    return x.to(kinds[to])


def _divided(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _gathered(a: Attributes, x: Tensor, at: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    at = torch.where(at < 0, at + x.shape[axis], at).long()
    return x.index_select(axis, at.reshape(-1)).reshape(*x.shape[:axis], *at.shape, *x.shape[axis + 1 :])


def _squeezed(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(_ints(axes)))


def _unsqueezed(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    ndim = x.ndim + axes.numel()
    for axis in sorted(n % ndim for n in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> Sequence[Tensor]:
    axis = a.get("axis", 0)
    count = a.get("num_outputs", 0)
    require(sizes is not None or bool(count), "Split without sizes")
    chunk = -(-x.shape[axis] // max(count, 1))
    each = _ints(sizes) if sizes is not None else [chunk] * (count - 1) + [x.shape[axis] - chunk * (count - 1)]
    return [x.narrow(axis, sum(each[:i]), size) for i, size in enumerate(each)]


_CONTRACTIONS: Mapping[gp.Contraction, Operator] = {
    gp.Contraction.MATMUL: lambda a, x, y: x @ y,
    gp.Contraction.GEMM: _gemm,
    gp.Contraction.CONV: _conv,
    gp.Contraction.EINSUM: lambda a, *xs: torch.einsum(a["equation"].decode(), *xs),
}

_OPERATORS: dict[str, Operator] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": lambda a, x: _pool(a, x, F.avg_pool2d, 0.0),
    "Cast": _cast,
    "Clip": _clipped,
    "Concat": lambda a, *xs: torch.cat(xs, dim=a["axis"]),
    "Div": _divided,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Erf": lambda a, x: torch.erf(x),
    "Exp": lambda a, x: x.exp(),
    "Expand": _expanded,
    "Flatten": _flat,
    "Gather": _gathered,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "GlobalAveragePool": lambda a, x: x.mean(dim=list(range(2, x.ndim)), keepdim=True),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda a, x: F.hardswish(x),
    "Identity": lambda a, x: x,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "LogSoftmax": lambda a, x: x.log_softmax(dim=a.get("axis", -1)),
    "MaxPool": lambda a, x: _pool(a, x, F.max_pool2d, -torch.inf),
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Pad": _pad,
    "Pow": lambda a, x, y: x**y,
    "Reciprocal": lambda a, x: x.reciprocal(),
    "ReduceL2": _reduced(torch.linalg.vector_norm),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": lambda a, x: x.relu(),
    "Reshape": _reshaped,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end", x.ndim)]),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _sliced,
    "Softmax": lambda a, x: x.softmax(dim=a.get("axis", -1)),
    "Split": _split,
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": _squeezed,
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": _turned,
    "Unsqueeze": _unsqueezed,
    "Where": lambda a, held, x, y: torch.where(held, x, y),
}
