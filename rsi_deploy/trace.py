"""One plain run of an ONNX model that also tells every node's shapes, and so its multiply-accumulates.

onnxruntime's profile of an unoptimized run holds the actual input and output shapes of each node, so what is counted
is what was executed: no shape inference that gives up on a Reshape, no guess for dynamic dimensions.

    Conv           out elements * in/groups * prod(kernel)
    ConvTranspose  in elements * out/groups * prod(kernel)
    MatMul, Gemm   out elements * inner dimension
    Attention      scores and mixture: batch * heads * queries * keys * (key width + value width)
"""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rsi_deploy.locks import ScratchFolder
from rsi_deploy.measure.sessions import make_session, run_session

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Outputs of the run, in the model's order; of the nodes, for the whole batch, MACs, where some, and inputs.

    Inputs are (onnxruntime's word for the type, shape), of every input that is there; in a loop those of the last turn.
    """

    outputs: list[npt.NDArray[Any]]
    macs: dict[str, int]
    inputs: dict[str, tuple[tuple[str, Shape], ...]] = field(default_factory=dict)


def traced_run(model: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> Trace:
    """Run `model` once on the CPU provider without graph optimizations, and count.

    Memory stays near the weights' own size: they are memory-mapped where external, and not rearranged.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
        OSError: the place for temporary files (TMPDIR) is full.
    """
    with ScratchFolder() as folder:
        session = make_session(
            model, optimize="disabled", prepack=False, profile_prefix=os.path.join(folder, "profile")
        )
        outputs = run_session(session, feeds, model.name)
        profile = Path(session.end_profiling())
        try:
            events = json.loads(profile.read_text(encoding="utf-8"))
        except ValueError as error:  # onnxruntime says nothing of a file that it could not write to its end
            raise OSError(errno.ENOSPC, "onnxruntime's profile is cut off", str(profile)) from error
    macs: dict[str, int] = {}
    inputs: dict[str, tuple[tuple[str, Shape], ...]] = {}
    for event in events:
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        node = event["name"].removesuffix("_kernel_time")
        inputs[node] = tuple(
            (kind, tuple(shape)) for entry in args["input_type_shape"] for kind, shape in entry.items()
        )
        count = node_macs(args["op_name"], _shapes(args["input_type_shape"]), _shapes(args["output_type_shape"]))
        if count:
            macs[node] = macs.get(node, 0) + count  # a node in a loop runs several times
    return Trace(outputs=outputs, macs=macs, inputs=inputs)


def node_macs(op_type: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """MACs of one executed node; 0 for an operator that multiplies no matrices.

    Example:
        >>> node_macs("MatMul", [(8, 50, 768), (768, 3072)], [(8, 50, 3072)]) == 8 * 50 * 768 * 3072
        True
        >>> node_macs("Conv", [(1, 64, 56, 56), (128, 64, 3, 3)], [(1, 128, 28, 28)]) == 128 * 28 * 28 * 64 * 9
        True
    """
    if op_type == "Conv":
        return math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if op_type == "ConvTranspose":
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if op_type == "MatMul":
        return math.prod(outputs[0]) * inputs[0][-1]
    if op_type == "Gemm":
        rows, columns = outputs[0]
        inner = math.prod(inputs[0]) // max(rows, 1)
        return rows * columns * inner
    if op_type == "Attention" and len(inputs) >= 3:
        # 4-D (batch, heads, length, width) or 3-D (batch, length, heads*width): heads*width is one product either way.
        q, k, v = inputs[:3]
        width = [math.prod(s) // (s[0] * s[-2]) if len(s) == 4 else s[-1] for s in (q, v)]
        return q[0] * q[-2] * k[-2] * sum(width)
    return 0


def _shapes(typed: list[dict[str, list[int]]]) -> list[Shape]:
    return [tuple(next(iter(entry.values()), [])) for entry in typed]
