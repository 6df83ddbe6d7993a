"""Run an ONNX model once and record every node's shapes, and so its multiply-accumulates (MACs).

onnxruntime's profile of an unoptimized run has the actual input and output shapes of each node. So the count is of what
was executed: dynamic dimensions, each iteration of a loop, one branch of an If. `graph_passes.count_macs` counts a
node; nodes that it cannot count are listed by name.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import ModelProto

from graph_passes import ExecutedNode, Macs, NotCounted, count_macs, why_not_counted
from rsi_deploy.core.types import Array, Feeds, Shape
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.runtime.node_index import NodeCandidate, NodeIndex
from rsi_deploy.runtime.probe_runs import decode_step
from rsi_deploy.runtime.profile_events import NodeEvent, node_events, read_events
from rsi_deploy.runtime.sessions import make_session, run_session

INSERTED = ("", "com.microsoft")
"""Domains of nodes that onnxruntime inserts, most likely first."""


@dataclass(frozen=True, kw_only=True)
class UncountedNode:
    """A node whose MACs are not known.

    Attributes:
        node: name of the node.
        op_type: operator, with its domain in front unless it is ONNX's.
        reason: why its MACs are not known.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShapeTrace:
    """The result of a run. Counts are for the whole batch, by the node's name in the model.

    Attributes:
        outputs: outputs of the model, in order; those of a decode step follow (see `probe_runs.run_probe`).
        macs: MACs of every node that has some.
        attention_macs: the part of them in scores and mixture of a fused attention, which factorization cannot change.
        uncounted: nodes whose MACs are not known.
        inputs: (onnxruntime's type name, shape) of each present input of every node; in a loop of the last iteration.
    """

    outputs: list[Array]
    macs: dict[str, int]
    attention_macs: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[UncountedNode, ...] = ()
    inputs: dict[str, tuple[tuple[str, Shape], ...]] = field(default_factory=dict)


def trace_run(model: Path, feeds: Feeds, proto: ModelProto | None = None) -> ShapeTrace:
    """Run `model` once on the CPU provider without graph optimizations, and count its MACs.

    Memory stays near the size of the weights: external weights are memory-mapped and not rearranged.

    Args:
        model: ONNX file.
        feeds: input name -> array.
        proto: the same model, parsed; None reads it from its file.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
        OSError: The temporary folder (TMPDIR) is full.
    """
    index = NodeIndex(proto or read_proto(model))
    with ScratchFolder() as folder:
        session = make_session(
            model, optimize="disabled", prepack=False, profile_prefix=os.path.join(folder, "profile")
        )
        outputs = run_session(session, feeds, model.name)
        events = read_events(session.end_profiling())
        outputs += decode_step(session, feeds, outputs, model.name)
    macs: dict[str, int] = {}
    attention: dict[str, int] = {}
    uncounted: dict[str, UncountedNode] = {}
    inputs: dict[str, tuple[tuple[str, Shape], ...]] = {}
    for event in node_events(events):
        candidates = index.find(event.op_type, event.node)
        names = {candidate.name for candidate in candidates}
        node = names.pop() if len(names) == 1 else event.node
        inputs[node] = tuple(
            (kind, tuple(shape)) for entry in event.args["input_type_shape"] for kind, shape in entry.items()
        )
        count = _count(event, candidates)
        if isinstance(count, NotCounted):
            operator = _operator(candidates[0].domain if candidates else "", event.op_type)
            uncounted[node] = UncountedNode(node=node, op_type=operator, reason=count.reason)
            continue
        if count.total:
            macs[node] = macs.get(node, 0) + count.total  # a node in a loop runs several times
        if count.attention:
            attention[node] = attention.get(node, 0) + count.attention
    return ShapeTrace(
        outputs=outputs, macs=macs, attention_macs=attention, uncounted=tuple(uncounted.values()), inputs=inputs
    )


def uncounted_nodes(nodes: Sequence[UncountedNode], shown: int = 3) -> str:
    """Describe nodes: the first few by name, each with its operator and the reason.

    Example:
        >>> uncounted_nodes([UncountedNode(node="mix", op_type="com.example.Mix", reason="no formula is known for it")])
        "node 'mix' (com.example.Mix: no formula is known for it)"
    """
    listed = "; ".join(f"node {node.node!r} ({node.op_type}: {node.reason})" for node in nodes[:shown])
    return listed + (f"; and {len(nodes) - shown} more" if len(nodes) > shown else "")


def unknown_operators(model: ModelProto) -> tuple[UncountedNode, ...]:
    """Return the nodes of a model whose operators cannot be counted."""
    return tuple(
        UncountedNode(node=node, op_type=_operator(domain, op_type), reason=reason)
        for node, domain, op_type in NodeIndex(model).operators()
        if (reason := why_not_counted(domain, op_type))
    )


def _count(event: NodeEvent, candidates: Sequence[NodeCandidate]) -> Macs | NotCounted:
    """Return the MACs of one execution; unknown if the candidates for its node have different counts."""
    inputs, outputs = _shapes(event.args["input_type_shape"]), _shapes(event.args["output_type_shape"])
    if not candidates:  # inserted by onnxruntime: casts, bodies of operators that are functions
        domain = next((domain for domain in INSERTED if not why_not_counted(domain, event.op_type)), "")
        return count_macs(
            ExecutedNode(domain=domain, op_type=event.op_type, inputs=tuple(inputs), outputs=tuple(outputs))
        )
    counts = {
        count_macs(
            ExecutedNode(
                domain=candidate.domain,
                op_type=event.op_type,
                inputs=_placed(inputs, candidate.inputs),
                outputs=_placed(outputs, candidate.outputs),
                attributes=candidate.attributes,
            )
        )
        for candidate in candidates
    }
    if len(counts) > 1:  # a candidate that does not fit the shapes is not the one that ran
        counts = {count for count in counts if not isinstance(count, NotCounted)}
    if len(counts) != 1:
        return NotCounted("several nodes, or calls of its function, run under this name and count differently")
    return counts.pop()


def _placed(shapes: Sequence[Shape], present: Sequence[bool]) -> tuple[Shape | None, ...]:
    """Put shapes at the positions of present values; unchanged if some value is not a tensor and has no shape."""
    if len(shapes) != sum(present):
        return tuple(shapes)
    found = iter(shapes)
    return tuple(next(found) if is_present else None for is_present in present)


def _operator(domain: str, op_type: str) -> str:
    return f"{domain}.{op_type}" if domain not in ("", "ai.onnx") else op_type


def _shapes(typed: list[dict[str, list[int]]]) -> list[Shape]:
    return [tuple(next(iter(entry.values()), [])) for entry in typed]
