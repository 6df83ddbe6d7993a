"""Queues of waiting requests, one for each group that can be joined, and the measured run time of their models."""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from rsi_deploy.serving.language.generation import PendingText
from rsi_deploy.serving.protocol.requests import RunResult
from rsi_deploy.serving.protocol.signature import Feeds

_RECENT = 0.2

QueueKey = tuple[object, ...]
"""(background, model key, shapes) that the requests of one queue have in common."""


@dataclass(kw_only=True, eq=False)
class QueuedRequest:
    """A request that waits for a worker.

    Attributes:
        key: key of its model.
        feeds: checked inputs.
        rows: number of rows of the inputs.
        shapes: shapes that must be equal in requests that are joined; a new object for a request that runs alone.
        arrived: time of arrival in monotonic seconds.
        deadline: time by which it must be answered, in monotonic seconds.
        background: whether it runs only when nothing else waits.
        future: future of its outputs.
        attempts: number of workers that died while they had it.
        bytes: size of its inputs.
        generation: the text to generate; it has no feeds then.
    """

    key: str
    feeds: Feeds
    rows: int
    shapes: tuple[object, ...]
    arrived: float
    deadline: float
    background: bool
    future: "asyncio.Future[RunResult]"
    attempts: int = 0
    bytes: int = 0
    generation: PendingText | None = None

    @property
    def alone(self) -> bool:
        """Return whether it must not be joined with others."""
        return not isinstance(self.shapes[0], tuple)


@dataclass(kw_only=True)
class Cost:
    """Running mean and mean deviation of the seconds that a row of one model takes.

    >>> steady, varying = Cost(), Cost()
    >>> for seconds in (0.1, 0.3, 0.1, 0.3):
    ...     steady.note(0.2, 2)
    ...     varying.note(seconds, 2)
    >>> round(steady.upper_estimate, 6), varying.upper_estimate > 0.15
    (0.1, True)
    """

    mean: float = 0.0
    spread: float = 0.0
    batches: int = 0

    def note(self, seconds: float, count: int) -> None:
        """Add the run time of a batch of `count` rows."""
        self.batches += 1
        share, difference = max(_RECENT, 1 / self.batches), seconds / count - self.mean
        self.mean += share * difference
        if self.batches > 1:
            self.spread += share * (abs(difference) - self.spread)

    @property
    def upper_estimate(self) -> float:
        """Seconds that a row is expected to take at most; 0 before the first batch."""
        return self.mean + 2 * self.spread


@dataclass(kw_only=True)
class Queue:
    """Waiting requests that can be joined with each other."""

    jobs: deque[QueuedRequest] = field(default_factory=deque)
    rows: int = 0

    @property
    def head(self) -> QueuedRequest:
        """The request that has waited longest."""
        return self.jobs[0]


class Queues:
    """All waiting requests.

    Attributes:
        waiting: number of requests that are not in the background.
        background: number of background requests.
        bytes: size of the inputs of all of them.
    """

    def __init__(self) -> None:
        self._queues: dict[QueueKey, Queue] = {}
        self.waiting = self.background = self.bytes = 0

    def __iter__(self) -> Iterator[tuple[QueueKey, Queue]]:
        return iter(list(self._queues.items()))

    def heads(self) -> list[QueuedRequest]:
        """Return the oldest request of every queue."""
        return [queue.head for queue in self._queues.values()]

    def get(self, queue_key: QueueKey) -> Queue | None:
        """Return a queue, or None if nothing waits in it."""
        return self._queues.get(queue_key)

    def push(self, job: QueuedRequest, *, first: bool = False) -> None:
        """Put a request at the end of its queue, or at its front."""
        queue = self._queues.setdefault((job.background, job.key, job.shapes), Queue())
        (queue.jobs.appendleft if first else queue.jobs.append)(job)
        queue.rows += job.rows
        self._count(job, 1)

    def pop(self, queue_key: QueueKey) -> QueuedRequest:
        """Remove and return the oldest request of a queue."""
        queue = self._queues[queue_key]
        job = queue.jobs.popleft()
        queue.rows -= job.rows
        self._count(job, -1)
        if not queue.jobs:
            del self._queues[queue_key]
        return job

    def seconds_ahead(self, costs: dict[str, Cost]) -> float:
        """Return the expected run time of all waiting requests but those in the background."""
        known = ((queue.head, queue.rows) for queue in self._queues.values())
        return sum(
            costs[job.key].upper_estimate * rows for job, rows in known if not job.background and job.key in costs
        )

    def _count(self, job: QueuedRequest, sign: int) -> None:
        self.waiting += sign * (not job.background)
        self.background += sign * job.background
        self.bytes += sign * job.bytes
