"""Compute how sensitive the outputs are to the sites of an ONNX graph: torch runs the operators behind the sites again.

    in front of all sites   onnxruntime      |  values that the rest reads
    behind a site           torch, float32   |  y_site --> ... --> z --(probe u)--> g at y_site

The output is the first floating one behind a site; only its ancestors run again. Under a padding mask `(N, L)` only
the tokens of an output `(N, L, ...)` count.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor

from rsi_deploy.calibration.activations import OutputSensitivity
from rsi_deploy.calibration.output_sensitivity import (
    SAMPLES,
    TOKENS,
    NoSensitivityError,
    SensitivityAccumulator,
    are_token_scores,
)
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.progress import at
from rsi_deploy.onnx_models.calibration.operators import FIRST_OPSET, operator
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached, row_sizes
from rsi_deploy.onnx_models.calibration.row_sampling import axes_of, first_tokens, padding_mask, takes_any_length
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import Program, needed_constants, reads
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

WINDOW = 256
"""Tokens of a text that get gradients: the first ones, because values kept for long texts take much memory."""

FLOATING = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def output_sensitivities(
    program: Program,
    path: Path,
    reached: Mapping[str, Reached],
    batches: Iterable[Feeds],
    *,
    samples: int,
    provider: str,
    seed: int,
) -> dict[str, OutputSensitivity]:
    """Return sensitivities by the names of sites; sites that do not reach the output have none.

    Args:
        program: the dense model.
        path: its file.
        reached: its sites, by output.
        batches: batches of model inputs.
        samples: number of samples in them.
        provider: execution provider of onnxruntime.
        seed: random seed for the probes.

    Raises:
        NoSensitivityError: gradients do not pass, or take too much memory.
    """
    if any(entry.version < FIRST_OPSET for entry in program.model.opset_import if entry.domain in ("", "ai.onnx")):
        raise NoSensitivityError(f"the model is of an opset before {FIRST_OPSET}")
    nodes = [node for node in program.model.graph.node if not set(node.output) & program.constants.keys()]
    behind = _behind(nodes, reached)
    known = {name for node in behind for name in node.output}
    ahead = [node for node in nodes if node.output[0] not in known]
    outputs = program.model.graph.output
    last = next((v for v in outputs if v.name in known and v.type.tensor_type.elem_type in FLOATING), None)
    if last is None:
        raise NoSensitivityError("no floating output depends on a site")
    are_scores = are_token_scores([dim.dim_value or None for dim in last.type.tensor_type.shape.dim])
    is_cut = are_scores and takes_any_length(program.model)
    accumulator = SensitivityAccumulator(
        {r.site.name: r.site for r in reached.values()},
        samples,
        seed=seed,
        most=TOKENS // WINDOW if are_scores else SAMPLES,
    )
    replay = _Replay(_ancestors(behind, last.name), reached, last.name)
    weights = _weights(program, path, replay.reads, accumulator)
    own = [*needed_constants(program, replay.nodes), *ahead]
    axes = axes_of(program.model)
    with Segment(program, path, own, Taps(), replay.reads, provider=provider) as run:
        for batch in batches:
            at("gradients of the output", accumulator.seen, samples)
            for whole, numbers in _pieces(batch, accumulator, axes):
                piece = first_tokens(whole, WINDOW) if is_cut else whole
                values = {name: _tensor(piece[name]) for name in replay.reads & piece.keys()}
                if run.outputs:
                    values |= {name: _tensor(value) for name, value in run(piece).items()}
                with accumulator.bounded_gradients(axes.samples(piece), weights.values()):
                    z, taps = replay(weights | values)
                    mask = padding_mask(piece)
                    if mask is not None and z.ndim > 2 and z.shape[:2] == mask.shape:
                        z = z[torch.from_numpy(mask)]
                accumulator.add_gradients(z, taps, numbers, are_scores=are_scores)
    return accumulator.result()


class _Replay:
    """Runs nodes in torch up to the value `end`, with the responses of `sites` (by output) tapped."""

    def __init__(self, nodes: Sequence[NodeProto], sites: Mapping[str, Reached], end: str) -> None:
        self.nodes, self._sites, self._end = nodes, sites, end
        self._operators = [operator(node) for node in nodes]
        self.reads = set().union(*(reads(node) for node in nodes)) - {name for node in nodes for name in node.output}
        self._uses = Counter(name for node in nodes for name in node.input if name)

    def __call__(self, values: dict[str, Tensor]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        """Return the output, and the responses of the sites."""
        taps: list[tuple[str, Tensor]] = []
        left = self._uses.copy()
        for node, call in zip(self.nodes, self._operators, strict=True):
            made = call(*(values[name] if name else None for name in node.input))
            for name, value in zip(node.output, made, strict=False):
                if (r := self._sites.get(name)) is not None:
                    rows, value = _tapped(r, value)
                    taps.append((r.site.name, rows))
                values[name] = value
            for name in filter(None, node.input):
                left[name] -= 1
                if not left[name] and name != self._end:
                    values.pop(name, None)
        return values[self._end], taps


def _tapped(r: Reached, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the response as rows `(..., out)` with gradients (of a Conv unchanged), and the value made of them."""
    width, axes = r.site.groups * r.site.out_features, list(r.order.output or range(value.ndim))
    ordered = value.permute(axes)
    in_place = r.site.kernel or (not r.order.output and value.shape[-1:] == (width,))
    rows = value if in_place else ordered.reshape(*row_sizes(ordered.shape, width), width)
    rows = rows if rows.requires_grad else rows.detach().requires_grad_()
    return rows, rows if in_place else rows.reshape(ordered.shape).permute(np.argsort(axes).tolist())


def _behind(nodes: Iterable[NodeProto], reached: Mapping[str, Reached]) -> list[NodeProto]:
    """Return the sites and all nodes that depend on one, in order."""
    known: set[str] = set()
    found = []
    for node in nodes:
        if node.output[0] in reached or known & reads(node):
            known |= set(node.output) - {""}
            found.append(node)
    return found


def _ancestors(nodes: Sequence[NodeProto], end: str) -> list[NodeProto]:
    """Return the nodes on which the value `end` depends, in order."""
    needed, found = {end}, []
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= reads(node)
            found.append(node)
    return found[::-1]


def _weights(program: Program, path: Path, names: set[str], accumulator: SensitivityAccumulator) -> dict[str, Tensor]:
    """Return the initializers of these names; their memory is reserved."""
    tensors = [tensor for tensor in program.model.graph.initializer if tensor.name in names]
    accumulator.reserve(sum(4 * int(np.prod(tensor.dims)) for tensor in tensors))
    return {tensor.name: _tensor(numpy_helper.to_array(tensor, str(path.parent))) for tensor in tensors}


def _tensor(value: Any) -> Tensor:
    """Return a tensor, float32 where it is floating."""
    tensor = as_torch(np.array(value))
    return tensor.float() if tensor.is_floating_point() else tensor


def _pieces(batch: Feeds, accumulator: SensitivityAccumulator, axes: BatchAxes) -> Iterator[tuple[Feeds, list[int]]]:
    """Yield the chosen samples of a batch in pieces, with their numbers; a batch of fixed size whole."""
    count, begin = axes.samples(batch), accumulator.seen
    at = accumulator.choose(count)
    if axes.fixed is not None:
        if len(at):
            yield batch, list(range(begin, begin + count))
        return
    for part in accumulator.pieces(len(at)):
        yield axes.cut(batch, at[part]), [begin + int(n) for n in at[part]]
