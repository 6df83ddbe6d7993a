"""What errors of a site's response do to an ONNX model's output: a metric for each site, by gradients in torch.

    upstream of all sites   onnxruntime      |  values that they read
    behind a site           torch operators  |  y_site --> ... --> z --(probe u)--> backward: g = d(u . z) / d y_site

    G = E[g g^T]   over positions, samples and probes u with E[u u^T] = I        (out, out) a group

To first order an error e of the response moves the output by `|J e|^2`, whose mean over independent positions is
`e^T G e`: the factor of the output's side in K-FAC (Martens and Grosse 2015), for the identity in the output's space.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor

from rsi_deploy.calibrate.onnx_reach import Reached
from rsi_deploy.calibrate.onnx_rows import Taps
from rsi_deploy.calibrate.onnx_segment import Segment
from rsi_deploy.calibrate.onnx_waves import Program, needed_constants, reads

Array = npt.NDArray[Any]
Attributes = Mapping[str, Any]

PROBES = 4
"""Random directions of the output a batch is asked for; every position of every sample answers each."""


class UnknownOperatorError(Exception):
    """An operator behind a site, or one of its settings, that torch is not taught here; the message names it."""


def output_metrics(
    program: Program,
    path: Path,
    reached: Mapping[str, Reached],
    batches: Sequence[Mapping[str, Array]],
    *,
    provider: str,
    seed: int,
) -> dict[str, Tensor]:
    """`G (groups, out, out)`, float64, of every site, by its name; sites that do not reach the output have none.

    Args:
        program: the dense model.
        path: its file.
        reached: its sites, by output.
        batches: model inputs.
        provider: onnxruntime's.
        seed: of the probes.

    Raises:
        UnknownOperatorError: behind a site stands an operator that is not known here.
    """
    nodes = [node for node in program.model.graph.node if not set(node.output) & program.constants.keys()]
    behind = _behind(nodes, reached)
    known = {name for node in behind for name in node.output}
    ahead = [node for node in nodes if node.output[0] not in known]
    for node in behind:
        if node.op_type not in _OPERATORS or node.domain:
            raise UnknownOperatorError(f"{node.op_type} ({node.name})")
    wanted = {name for node in behind for name in reads(node)} - known
    weights = {
        tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor, str(path.parent))))
        for tensor in program.model.graph.initializer
        if tensor.name in wanted
    }
    end = next((value.name for value in program.model.graph.output if value.name in known), None)
    if end is None:
        return {}
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    own = [*needed_constants(program, behind), *ahead]
    inputs = {value.name for value in program.model.graph.input} & wanted
    with Segment(program, path, own, Taps(), wanted, provider=provider) as run:
        for batch in batches:
            values = {name: _tensor(value) for name, value in run(batch).items()} if run.outputs else {}
            values |= {name: _tensor(batch[name]) for name in inputs - weights.keys()}
            for name, gradient in _gradients(behind, {**weights, **values}, reached, end, generator):
                r = reached[name]
                rows = _rows(gradient, r)
                found[r.site.name] = found.get(r.site.name, 0) + (rows.mT @ rows).double()
    return {name: G for name, G in found.items() if bool(torch.isfinite(G).all()) and float(G.sum().abs()) > 0}


def _behind(nodes: Iterable[NodeProto], reached: Mapping[str, Reached]) -> list[NodeProto]:
    """The sites and all nodes that depend on one, in order."""
    known: set[str] = set()
    found = []
    for node in nodes:
        if node.output[0] in reached or known & reads(node):
            known |= set(node.output)
            found.append(node)
    return found


def _gradients(
    nodes: Sequence[NodeProto],
    values: dict[str, Tensor],
    reached: Mapping[str, Reached],
    end: str,
    generator: torch.Generator,
) -> Iterable[tuple[str, Tensor]]:
    """(output of a site, gradient of one probe there), probe by probe."""
    taps: dict[str, Tensor] = {}
    with torch.enable_grad():
        for node in nodes:
            given = [values[name] if name else None for name in node.input]
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            value = _OPERATORS[node.op_type](attributes, *given)
            name = node.output[0]
            if name in reached:
                if not value.requires_grad:
                    value = value.detach().requires_grad_()
                taps[name] = value
            values[name] = value
        z = values[end]
        for number in range(PROBES):
            u = torch.randn(z.shape, generator=generator).to(z.dtype)
            kept = number < PROBES - 1
            gradients = torch.autograd.grad((z * u).sum(), list(taps.values()), retain_graph=kept, allow_unused=True)
            yield from ((name, g) for name, g in zip(taps, gradients, strict=True) if g is not None)


def _rows(gradient: Tensor, r: Reached) -> Tensor:
    """`(groups, rows, out)` of a gradient of the site's output, `(..., out)` or, of a Conv, `(N, out, *size)`."""
    if r.site.kernel:
        gradient = gradient.movedim(1, -1)
    return gradient.reshape(-1, r.site.groups, r.site.out_features).movedim(1, 0)


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.array(value))


# --- operators ------------------------------------------------------------------------------------------------------


def _ints(value: Tensor) -> list[int]:
    return [int(n) for n in value.reshape(-1)]


def _require(held: bool, what: str) -> None:
    if not held:
        raise UnknownOperatorError(what)


def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *more: Any) -> Tensor:
    plain = q.ndim == 4 and not a.get("softcap") and not any(t is not None for t in more) and k.shape[1] == q.shape[1]
    _require(plain, "Attention with groups, softcap, a cache or 3-D inputs")
    causal = bool(a.get("is_causal", 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=a.get("scale"))


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    axes = w.ndim - 2
    _require(axes in (1, 2, 3) and a.get("auto_pad", b"NOTSET") == b"NOTSET", "Conv with auto_pad")
    strides, dilations = a.get("strides", [1] * axes), a.get("dilations", [1] * axes)
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return conv(_padded(x, a, axes, 0.0), w, b, stride=strides, dilation=dilations, groups=a.get("group", 1))


def _padded(x: Tensor, a: Attributes, axes: int, value: float) -> Tensor:
    pads = a.get("pads", [0] * 2 * axes)
    return F.pad(x, [p for axis in reversed(range(axes)) for p in (pads[axis], pads[axis + axes])], value=value)


def _pool(a: Attributes, x: Tensor, pool: Callable[..., Tensor], value: float) -> Tensor:
    axes = x.ndim - 2
    plain = axes == 2 and not a.get("ceil_mode") and a.get("auto_pad", b"NOTSET") == b"NOTSET"
    plain = plain and set(a.get("dilations", [1])) == {1}
    _require(plain and (value != 0 or not any(a.get("pads", [])) or bool(a.get("count_include_pad"))), "a pool")
    return pool(_padded(x, a, axes, value), a["kernel_shape"], a.get("strides", [1] * axes))


def _gemm(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    x, w = (x.mT if a.get("transA") else x), (w.mT if a.get("transB") else w)
    y: Tensor = float(a.get("alpha", 1.0)) * (x @ w)
    return y if b is None else y + float(a.get("beta", 1.0)) * b


def _normalized(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = a.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    scale = scale.expand(shape)
    return F.layer_norm(x, shape, scale, None if bias is None else bias.expand(shape), a.get("epsilon", 1e-5))


def _reduced(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
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
    _require(min(by) > 0, "Slice with a negative step")
    at = [slice(None)] * x.ndim
    for axis, begin, end, step in zip(over, first, last, by, strict=True):
        at[axis] = slice(begin, end, step)
    return x[tuple(at)]


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    _require(a.get("mode", b"constant") == b"constant" and axes is None, "Pad with a mode or axes")
    return _padded(x, {"pads": _ints(pads)}, x.ndim, 0.0 if value is None else float(value))


def _clipped(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _turned(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(a.get("perm") or list(reversed(range(x.ndim))))


def _flat(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, x, y: x + y,
    "Attention": _attention,
    "AveragePool": lambda a, x: _pool(a, x, F.avg_pool2d, 0.0),
    "Clip": _clipped,
    "Concat": lambda a, *xs: torch.cat(xs, dim=a["axis"]),
    "Conv": _conv,
    "Div": lambda a, x, y: x / y,
    "Erf": lambda a, x: torch.erf(x),
    "Expand": _expanded,
    "Flatten": _flat,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(dim=list(range(2, x.ndim)), keepdim=True),
    "Identity": lambda a, x: x,
    "LayerNormalization": _normalized,
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": lambda a, x: _pool(a, x, F.max_pool2d, -torch.inf),
    "Mul": lambda a, x, y: x * y,
    "Pad": _pad,
    "ReduceL2": _reduced(torch.linalg.vector_norm),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": lambda a, x: x.relu(),
    "Reshape": _reshaped,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end", x.ndim)]),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _sliced,
    "Softmax": lambda a, x: x.softmax(dim=a.get("axis", -1)),
    "Sqrt": lambda a, x: x.sqrt(),
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": _turned,
}
