"""onnxruntime's profile, read: one event for every execution of a node, and the time that is the node's own.

The time of a Loop, an If or a Scan holds that of its body's nodes, which have events of their own. Their time counts at
those nodes, and what is left at the Loop.
"""

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTAINERS = frozenset(("If", "Loop", "Scan", "SequenceMap", "BeamSearch", "GreedySearch", "Sampling"))
"""Operators that run the nodes of other graphs."""
_SUFFIX = "_kernel_time"


@dataclass(frozen=True, kw_only=True)
class NodeEvent:
    """One execution of a node.

    Attributes:
        node: its name, as onnxruntime has it.
        op_type: its operator.
        start: microseconds.
        own: microseconds of the node without the nodes of its bodies.
        args: what else the profile says: shapes, provider.
    """

    node: str
    op_type: str
    start: float
    own: float
    args: Mapping[str, Any]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """All events of a profile that onnxruntime has written.

    Raises:
        OSError: it is cut off, for the disk was full.
    """
    try:
        events: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # onnxruntime says nothing of a file that it could not write to its end
        raise OSError(errno.ENOSPC, "onnxruntime's profile is cut off", str(path)) from error
    return events


def node_events(events: Iterable[Mapping[str, Any]]) -> Iterator[NodeEvent]:
    """The executions of nodes, in the order in which they ended.

    An event is written when the node ends, and a body runs on the thread of its Loop. So of the events of this thread,
    those written before the Loop's that began no earlier than the Loop are its body's.
    """
    outside: dict[Any, list[tuple[float, float]]] = {}  # thread -> (start, duration) of those that no container holds
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith(_SUFFIX):
            continue
        args = event.get("args", {})
        op_type = args.get("op_name", "?")
        start, duration = event.get("ts", 0.0), event.get("dur", 0.0)
        own = duration
        before = outside.setdefault(event.get("tid"), [])
        while op_type in CONTAINERS and before and before[-1][0] >= start:
            own -= before.pop()[1]
        before.append((start, duration))
        yield NodeEvent(node=name.removesuffix(_SUFFIX), op_type=op_type, start=start, own=max(own, 0.0), args=args)
