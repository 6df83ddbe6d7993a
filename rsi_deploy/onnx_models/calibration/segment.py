"""Run a part of an ONNX graph as a model of its own in onnxruntime.

    values from outside  -->  nodes, some of them split, and taps  -->  values of the nodes, and gathered rows

The model is written beside the dense one, so that both share a data file, and is removed after the run.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, helper

import graph_passes as gp
from graph_passes.forms import FOLDED
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.stages import Program, needed_constants, reads
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


class Segment:
    """Nodes of a program, to be run batch by batch. Use it in a `with`.

    Args:
        program: the graph that holds the nodes.
        path: the dense model; the segment is written into its folder.
        nodes: nodes of the segment, in order.
        taps: nodes that gather rows.
        alive: names of values of the nodes that are outputs of the segment.
        factors: weight name -> its factors; nodes of other weights stay dense.
        provider: execution provider of onnxruntime.

    Attributes:
        reads: names of its inputs.
        keeps: names of its outputs that are values of the graph.
        outputs: names of all outputs, rows included.
    """

    def __init__(
        self,
        program: Program,
        path: Path,
        nodes: Iterable[NodeProto],
        taps: Taps,
        alive: Iterable[str] = (),
        factors: Mapping[str, gp.SplitFactors] | None = None,
        *,
        provider: str = "cpu",
    ) -> None:
        self._program, self._provider, self._factors = program, provider, dict(factors or {})
        self._path = path.with_name(f".segment-{uuid.uuid4().hex}.onnx")
        own = list(nodes)
        # Constants come along with the nodes that read them.
        there = {name for node in own for name in node.output if name}
        constants = [node for node in needed_constants(program, [*own, *taps.nodes]) if not there & set(node.output)]
        self._nodes = [*constants, *own, *taps.nodes]
        made = {name for node in self._nodes for name in node.output}
        shapes = {tensor.name for tensor in taps.constants}
        read = set().union(*(reads(node) for node in self._nodes)) if self._nodes else set()
        self._taps = taps
        self.keeps = sorted(there & set(alive))
        self.reads = read - made - program.fixed - shapes
        self.outputs = [*self.keeps, *taps.outputs]
        self._session: InferenceSession | None = None

    def __enter__(self) -> "Segment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        self._path.unlink(missing_ok=True)

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run it; feeds that it does not read are ignored."""
        needed = {name: feeds[name] for name in self.reads}
        if self._session is None:
            self._session = self._started(needed)
        return dict(zip(self.outputs, run_session(self._session, needed, "a part of the model"), strict=True))

    def _started(self, feeds: Mapping[str, Any]) -> "InferenceSession":
        whole = self._program.model
        model = ModelProto(ir_version=max(whole.ir_version, 4), opset_import=whole.opset_import)
        model.functions.extend(whole.functions)
        graph = model.graph
        graph.name = "segment"
        for name, array in feeds.items():
            graph.input.append(_value_info(name, array))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs)
        graph.node.extend(self._nodes)
        read = set().union(*(reads(node) for node in self._nodes)) | set(self.outputs)
        graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in read)
        graph.initializer.extend(self._taps.constants)
        graph.sparse_initializer.extend(s for s in whole.graph.sparse_initializer if s.values.name in read)
        onnx.save(model, self._path)
        if self._factors:
            self._split()
        # The factors are computed between the runs: idle workers must not spin on their cores.
        # An arena would keep the memory of the largest wave.
        # The whole model was checked when it was read.
        session = make_session(self._path, self._provider, spin_between_runs=False, arena=False, checked=True)
        self._path.unlink()
        return session

    def _split(self) -> None:
        """Split the weights that have factors, in the file."""
        model = load_model(self._path)
        factors = self._factors

        def source(site: gp.Site) -> gp.SplitFactors | gp.Dense:
            own = factors.get(site.weight)
            if own is None:
                return gp.Dense(reason="not replaced yet")
            # The nodes before may stand in another segment, so the first node is not folded into them.
            return replace(own, form="input" if "input" in site.forms else "first") if own.form in FOLDED else own

        records = gp.split(model, source)
        if missed := factors.keys() - {record.weight for record in records if isinstance(record, gp.Split)}:
            reasons = [f"{r.weight!r}: {r.reason}" for r in records if isinstance(r, gp.Skip) and r.weight in missed]
            raise ModelError(
                f"calibration cannot split the weight {', '.join(reasons) or sorted(missed)}"
                f"; leave it out with --exclude"
            )
        ir.save(model, self._path)


def _value_info(name: str, value: Any) -> onnx.ValueInfoProto:
    """Return the type of an array, or of a sequence of arrays."""
    if isinstance(value, list):
        dtype = value[0].dtype if value else np.dtype(np.float32)
        return helper.make_tensor_sequence_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None)
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
