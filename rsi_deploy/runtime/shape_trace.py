"""One plain run of an ONNX model that also tells every node's shapes, and so its multiply-accumulates (MACs).

onnxruntime's profile of an unoptimized run holds the actual input and output shapes of each node, so what is counted
is what was executed: no shape inference that gives up on a Reshape, no guess for dynamic dimensions, each turn of a
loop, one branch of an If. `graph_passes.count_macs` says what a node counts; what it cannot tell is listed by name.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
from onnx import ModelProto

from graph_passes import ExecutedNode, Macs, NotCounted, count_macs, why_not_counted
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.runtime.node_index import NodeCandidate, NodeIndex
from rsi_deploy.runtime.profile_events import NodeEvent, node_events, read_events
from rsi_deploy.runtime.sessions import make_session, run_session

Shape = tuple[int, ...]

INSERTED = ("", "com.microsoft")
"""Domains of what onnxruntime puts in, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class UncountedNode:
    """A node whose MACs are not known.

    Attributes:
        node: its name.
        op_type: its operator, with the domain in front where it is not ONNX's.
        reason: why.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShapeTrace:
    """A run. Counts are those of the whole batch, by the name of the node in the model.

    Attributes:
        outputs: of the model, in its order.
        macs: of every node that has some.
        attention_macs: of them, those of scores and mixture inside a fused attention, which no factorization changes.
        uncounted: nodes whose MACs are not known.
        inputs: of every node, (onnxruntime's word for the type, shape) of each input that is there; in a loop those of
            the last turn.
    """

    outputs: list[npt.NDArray[Any]]
    macs: dict[str, int]
    attention_macs: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[UncountedNode, ...] = ()
    inputs: dict[str, tuple[tuple[str, Shape], ...]] = field(default_factory=dict)


def traced_run(model: Path, feeds: Mapping[str, npt.NDArray[Any]], proto: ModelProto | None = None) -> ShapeTrace:
    """Run `model` once on the CPU provider without graph optimizations, and count.

    Memory stays near the weights' own size: they are memory-mapped where external, and not rearranged.

    Args:
        model: an ONNX file.
        feeds: input name -> array.
        proto: the same model, where it is parsed already.

    Raises:
        ModelError: onnxruntime cannot load or run the model.
        OSError: the place for temporary files (TMPDIR) is full.
    """
    index = NodeIndex(proto or read_proto(model))
    with ScratchFolder() as folder:
        session = make_session(
            model, optimize="disabled", prepack=False, profile_prefix=os.path.join(folder, "profile")
        )
        outputs = run_session(session, feeds, model.name)
        events = read_events(session.end_profiling())
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
    """Nodes in words: the first few by name, each with its operator and the reason.

    Example:
        >>> uncounted_nodes([UncountedNode(node="mix", op_type="com.example.Mix", reason="no formula is known for it")])
        "node 'mix' (com.example.Mix: no formula is known for it)"
    """
    listed = "; ".join(f"node {node.node!r} ({node.op_type}: {node.reason})" for node in nodes[:shown])
    return listed + (f"; and {len(nodes) - shown} more" if len(nodes) > shown else "")


def unknown_operators(model: ModelProto) -> tuple[UncountedNode, ...]:
    """Return the nodes of a model whose operators no run could count."""
    return tuple(
        UncountedNode(node=node, op_type=_operator(domain, op_type), reason=reason)
        for node, domain, op_type in NodeIndex(model).operators()
        if (reason := why_not_counted(domain, op_type))
    )


def _count(event: NodeEvent, candidates: Sequence[NodeCandidate]) -> Macs | NotCounted:
    """What one execution counts; not known where the nodes that it may have been count differently."""
    inputs, outputs = _shapes(event.args["input_type_shape"]), _shapes(event.args["output_type_shape"])
    if not candidates:  # what onnxruntime has put in: casts, the body of an operator that is a function of others
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


def _placed(shapes: Sequence[Shape], there: Sequence[bool]) -> tuple[Shape | None, ...]:
    """The shapes at the positions that are there; as they are where some value is no tensor and has no shape."""
    if len(shapes) != sum(there):
        return tuple(shapes)
    found = iter(shapes)
    return tuple(next(found) if is_there else None for is_there in there)


def _operator(domain: str, op_type: str) -> str:
    return f"{domain}.{op_type}" if domain not in ("", "ai.onnx") else op_type


def _shapes(typed: list[dict[str, list[int]]]) -> list[Shape]:
    return [tuple(next(iter(entry.values()), [])) for entry in typed]
