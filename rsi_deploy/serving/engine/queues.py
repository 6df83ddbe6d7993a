"""Requests that wait, in the order they came, by what can be joined; and what their models cost."""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rsi_deploy.serving.protocol.requests import Ran
from rsi_deploy.serving.protocol.signature import Feeds

_RECENT = 0.2

Place = tuple[object, ...]
"""What requests of one queue have in common."""


@dataclass(kw_only=True, eq=False)
class QueuedRequest:
    """One request on its way to a worker.

    Attributes:
        key: of its model.
        feeds: checked inputs.
        rows: of them.
        shapes: what must be equal in requests that are joined; a fresh object where it goes alone.
        arrived: monotonic seconds.
        deadline: likewise, when it must be answered.
        behind: whether it runs only where nothing else waits.
        future: of its answer.
        attempts: how many workers have died with it.
        bytes: of its inputs.
    """

    key: str
    feeds: Feeds
    rows: int
    shapes: tuple[object, ...]
    arrived: float
    deadline: float
    behind: bool
    future: "asyncio.Future[Ran]"
    attempts: int = 0
    bytes: int = 0

    @property
    def alone(self) -> bool:
        """Whether it is joined with no other."""
        return not isinstance(self.shapes[0], tuple)


@dataclass(kw_only=True)
class Cost:
    """Seconds a row of one model takes, and how far that strays.

    >>> steady, straying = Cost(), Cost()
    >>> for seconds in (0.1, 0.3, 0.1, 0.3):
    ...     steady.note(0.2, 2)
    ...     straying.note(seconds, 2)
    >>> round(steady.likely_most, 6), straying.likely_most > 0.15
    (0.1, True)
    """

    a_row: float = 0.0
    spread: float = 0.0
    batches: int = 0

    def note(self, seconds: float, count: int) -> None:
        """Count one batch of `count` rows."""
        self.batches += 1
        share, off = max(_RECENT, 1 / self.batches), seconds / count - self.a_row
        self.a_row += share * off
        if self.batches > 1:
            self.spread += share * (abs(off) - self.spread)

    @property
    def likely_most(self) -> float:
        """Seconds that a row is not expected to exceed; 0 before the first batch."""
        return self.a_row + 2 * self.spread


@dataclass(kw_only=True)
class Queue:
    """Requests that can be joined."""

    jobs: deque[QueuedRequest] = field(default_factory=deque)
    rows: int = 0

    @property
    def head(self) -> QueuedRequest:
        """The one that has waited longest."""
        return self.jobs[0]


class Queues:
    """All that waits.

    Attributes:
        waiting: requests.
        behind: requests that only run where nothing else waits.
        bytes: of all their inputs.
    """

    def __init__(self) -> None:
        self._queues: dict[Place, Queue] = {}
        self.waiting = self.behind = self.bytes = 0

    def __iter__(self) -> Iterator[tuple[Place, Queue]]:
        return iter(list(self._queues.items()))

    def heads(self) -> list[QueuedRequest]:
        """The oldest request of every queue."""
        return [queue.head for queue in self._queues.values()]

    def get(self, place: Place) -> Queue | None:
        """The queue, while something waits in it."""
        return self._queues.get(place)

    def push(self, job: QueuedRequest, *, first: bool = False) -> None:
        """Put a request at the end of its queue, or in front."""
        queue = self._queues.setdefault((job.behind, job.key, job.shapes), Queue())
        (queue.jobs.appendleft if first else queue.jobs.append)(job)
        queue.rows += job.rows
        self._count(job, 1)

    def pop(self, place: Place) -> QueuedRequest:
        """Take the oldest request of a queue."""
        queue = self._queues[place]
        job = queue.jobs.popleft()
        queue.rows -= job.rows
        self._count(job, -1)
        if not queue.jobs:
            del self._queues[place]
        return job

    def seconds_ahead(self, costs: dict[str, Cost]) -> float:
        """Work that waits and is not behind."""
        known = ((queue.head, queue.rows) for queue in self._queues.values())
        return sum(costs[job.key].likely_most * rows for job, rows in known if not job.behind and job.key in costs)

    def _count(self, job: QueuedRequest, sign: int) -> None:
        self.waiting += sign * (not job.behind)
        self.behind += sign * job.behind
        self.bytes += sign * job.bytes
