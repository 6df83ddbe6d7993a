"""Read onnxruntime's profile: one event for each execution of a node, with the time of the node itself.

The time of a Loop, If or Scan includes the nodes of its body, which have events of their own. That time is subtracted
here.
"""

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTAINERS = frozenset(("If", "Loop", "Scan", "SequenceMap", "BeamSearch", "GreedySearch", "Sampling"))
"""Operators that run nodes of other graphs."""
_SUFFIX = "_kernel_time"


@dataclass(frozen=True, kw_only=True)
class NodeEvent:
    """One execution of a node.

    Attributes:
        node: name of the node in onnxruntime.
        op_type: operator.
        start: microseconds.
        own: microseconds of the node without the nodes of its bodies.
        args: other entries of the profile, such as shapes and provider.
    """

    node: str
    op_type: str
    start: float
    own: float
    args: Mapping[str, Any]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Read all events of a profile.

    Raises:
        OSError: The profile is cut off because the disk was full.
    """
    try:
        events: list[dict[str, Any]] = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # onnxruntime reports no error for a profile that it could not finish
        raise OSError(errno.ENOSPC, "onnxruntime's profile is cut off", str(path)) from error
    return events


def node_events(events: Iterable[Mapping[str, Any]]) -> Iterator[NodeEvent]:
    """Yield the executions of nodes in the order in which they ended.

    An event is written when its node ends, and a body runs on the thread of its Loop. So the body's events are those of
    the same thread that were written before the Loop's event and began no earlier than the Loop.
    """
    outside: dict[Any, list[tuple[float, float]]] = {}  # thread -> (start, duration) of events outside any container
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
