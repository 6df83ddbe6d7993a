"""Requests wait here, are joined into batches, and go to idle workers, within a bound on how long that may take.

    joined     requests of one model whose shapes differ in the first axis alone, as many rows as `max_batch`, and no
               more than a quarter of the bound is expected to run
    when       a worker is idle, and the batch is full, its oldest request has waited `batch_delay`, or there is no
               sign of other clients
    refused    429 at once, where the answer is expected to take longer than `latency_bound`; 503 later, where a request
               has waited so long after all that it cannot be answered within it
    retried    once, where the worker died with it; then 503

What a row costs is measured: a running mean over the batches of its model, and for promises twice its mean deviation on
top, as TCP does for round trips: on a machine that others use, times come and go.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rsi_deploy.serving.model import Outputs
from rsi_deploy.serving.refusal import Refusal
from rsi_deploy.serving.signature import Feeds, rows
from rsi_deploy.serving.workers import Pool, Worker, WorkerDied

MOST_WAITING = 4096
MOST_BYTES = 512 << 20
MOST_BEHIND = 64
"""Shadow requests that wait at most; more are left out."""
LONELY = 0.5
"""Requests of a lone client wait for nobody: others at work or waiting when one comes, a running mean."""
_RECENT = 0.2


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How requests are joined and how long they may take.

    Attributes:
        max_batch: rows of a batch of several requests; 1 joins none. A request of more rows runs alone.
        batch_delay: seconds that a request waits for others while a worker is idle.
        latency_bound: seconds, see the module.
        run_timeout: seconds after which a worker counts as hung and is killed.
    """

    max_batch: int = 16
    batch_delay: float = 0.002
    latency_bound: float = 2.0
    run_timeout: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A request's outputs, and how it ran: seconds in the queue and in its batch, and rows and requests of that."""

    outputs: Outputs
    waited: float
    ran: float
    rows: int
    requests: int


@dataclass(kw_only=True, eq=False)
class _Job:
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


@dataclass(kw_only=True)
class _Cost:
    """Seconds a row of one model takes, and how far that strays."""

    a_row: float = 0.0
    spread: float = 0.0
    batches: int = 0

    def note(self, seconds: float, count: int) -> None:
        self.batches += 1
        share, off = max(_RECENT, 1 / self.batches), seconds / count - self.a_row
        self.a_row += share * off
        if self.batches > 1:
            self.spread += share * (abs(off) - self.spread)


@dataclass(kw_only=True)
class _Queue:
    jobs: deque[_Job] = field(default_factory=deque)
    rows: int = 0


class Batcher:
    """The queues, and the way to the workers.

    Args:
        limits: of batches and time.
        on_batch: called with (model key, rows, requests, seconds) after each batch.

    Attributes:
        pool: set once, before the first request.
    """

    pool: Pool

    def __init__(self, limits: BatchLimits, on_batch: Callable[[str, int, int, float], None]):
        self._limits, self._on_batch = limits, on_batch
        self._queues: dict[tuple[object, ...], _Queue] = {}
        self._costs: dict[str, _Cost] = {}
        self._ends: dict[Worker, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = self._behind = self._bytes = self._open = 0
        self._company = 0.0  # requests that a new one has found at work or waiting, a running mean

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return self._waiting

    @property
    def running(self) -> int:
        """Batches at work."""
        return len(self._ends)

    async def run(self, key: str, feeds: Feeds, *, alone: bool, behind: bool = False) -> Ran:
        """The outputs of one request.

        Args:
            key: of the model.
            feeds: checked inputs.
            alone: it cannot be joined with others.
            behind: it runs only where nothing else waits (a shadow's), for as long as that takes.

        Raises:
            Refusal: 429 or 503 as the module says; 400, onnxruntime could not run these inputs.
        """
        size = sum(array.nbytes for array in feeds.values())
        count = rows(feeds)
        self._admit(key, count, size, behind)
        shapes = (object(),) if alone else tuple((name, a.shape[1:]) for name, a in sorted(feeds.items()))
        now = time.monotonic()
        job = _Job(
            key=key,
            feeds=feeds,
            rows=count,
            shapes=shapes,
            arrived=now,
            deadline=math.inf if behind else now + self._limits.latency_bound,
            behind=behind,
            future=asyncio.get_running_loop().create_future(),
            bytes=size,
        )
        self._push(job)
        if not behind:
            self._company += 0.1 * (self._open - self._company)
        self._open += not behind
        try:
            self.pump()
            return await job.future
        finally:
            self._open -= not behind

    def pump(self) -> None:
        """Give idle workers what is ripe, drop what is too old, and come back when more gets ripe."""
        now = time.monotonic()
        self._drop_old(now)
        for worker in (*self.pool.active, *self.pool.retiring):
            if not worker.busy and not worker.ended and (batch := self._ripe(worker, now)):
                self._start(worker, batch)
        self.pool.retire(lambda worker: any(job.key in worker.keys - self.pool.keys for job in self._heads()))
        self._arm(now)

    def _admit(self, key: str, count: int, size: int, behind: bool) -> None:
        if behind:
            if self._behind >= MOST_BEHIND:
                raise Refusal(429, "too many shadow requests wait")
            return
        if self._waiting >= MOST_WAITING or self._bytes + size > MOST_BYTES:
            raise Refusal(429, "too many requests wait; try again later", retry_after=1)
        now, workers = time.monotonic(), max(len(self.pool.active), 1)
        ahead = sum(max(end - now, 0.0) for end in self._ends.values())
        ahead += sum(
            self._a_row(queue.jobs[0].key) * queue.rows for queue in self._queues.values() if not queue.jobs[0].behind
        )
        own = self._a_row(key) * max(count, self._most_rows(key))
        expected = ahead / workers + own
        bound = self._limits.latency_bound
        if ahead and expected > bound:
            text = f"the work ahead takes {expected:.2f} s, more than the bound of {bound:g} s; try again later"
            raise Refusal(429, text, retry_after=max(expected - bound, 1.0))

    def _a_row(self, key: str) -> float:
        """Seconds that a row is not expected to exceed; 0 before the first batch."""
        cost = self._costs.get(key)
        return cost.a_row + 2 * cost.spread if cost else 0.0

    def _latest(self, job: _Job) -> float:
        """When a job must start to be answered in time; one that takes most of the bound itself has half of it."""
        own = self._a_row(job.key) * max(job.rows, self._most_rows(job.key))
        return job.deadline - min(own, self._limits.latency_bound / 2)

    def _most_rows(self, key: str) -> int:
        """Rows of a batch: what the limits allow, and what is expected to run in a quarter of the bound."""
        cost = self._a_row(key)
        fitting = int(self._limits.latency_bound / 4 / cost) if cost else self._limits.max_batch
        return max(1, min(self._limits.max_batch, fitting))

    def _push(self, job: _Job, *, first: bool = False) -> None:
        queue = self._queues.setdefault((job.behind, job.key, job.shapes), _Queue())
        (queue.jobs.appendleft if first else queue.jobs.append)(job)
        queue.rows += job.rows
        self._waiting += not job.behind
        self._behind += job.behind
        self._bytes += job.bytes

    def _pop(self, place: tuple[object, ...]) -> _Job:
        queue = self._queues[place]
        job = queue.jobs.popleft()
        queue.rows -= job.rows
        self._waiting -= not job.behind
        self._behind -= job.behind
        self._bytes -= job.bytes
        if not queue.jobs:
            del self._queues[place]
        return job

    def _heads(self) -> Sequence[_Job]:
        return [queue.jobs[0] for queue in self._queues.values()]

    def _drop_old(self, now: float) -> None:
        for place in list(self._queues):
            while place in self._queues and (
                (head := self._queues[place].jobs[0]).future.done() or self._latest(head) < now
            ):
                job = self._pop(place)
                if not job.future.done():
                    text = f"no worker was free within the bound of {self._limits.latency_bound:g} s; try again later"
                    job.future.set_exception(Refusal(503, text, retry_after=1))

    def _ripe(self, worker: Worker, now: float) -> list[_Job]:
        """The batch that this worker should run now; empty where none is ripe."""
        fresh = worker in self.pool.active
        chosen: tuple[object, ...] | None = None
        best: tuple[bool, float] = (True, math.inf)
        for place, queue in self._queues.items():
            head = queue.jobs[0]
            takes = head.key in worker.keys and (fresh or head.key not in self.pool.keys)
            if takes and (head.behind, head.arrived) < best and now >= self._ripe_at(queue):
                chosen, best = place, (head.behind, head.arrived)
        if chosen is None:
            return []
        batch = [self._pop(chosen)]
        count, most = batch[0].rows, self._most_rows(batch[0].key)
        while (queue_ := self._queues.get(chosen)) and count + queue_.jobs[0].rows <= most:
            job = self._pop(chosen)
            if not job.future.done():
                batch.append(job)
                count += job.rows
        return batch

    def _ripe_at(self, queue: _Queue) -> float:
        head = queue.jobs[0]
        full = queue.rows >= self._most_rows(head.key)
        if full or head.attempts or self._company < LONELY or not isinstance(head.shapes[0], tuple):
            return 0.0
        return head.arrived + self._limits.batch_delay

    def _start(self, worker: Worker, batch: list[_Job]) -> None:
        worker.busy = True
        count = sum(job.rows for job in batch)
        self._ends[worker] = time.monotonic() + self._a_row(batch[0].key) * count
        task = asyncio.create_task(self._run(worker, batch, count))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, worker: Worker, batch: list[_Job], count: int) -> None:
        key, start = batch[0].key, time.monotonic()
        try:
            answers, seconds = await worker.run(key, [job.feeds for job in batch], self._limits.run_timeout)
        except WorkerDied as death:
            self._retry(batch, counts=death.had_it)
        else:
            self._costs.setdefault(key, _Cost()).note(seconds, count)
            self._on_batch(key, count, len(batch), seconds)
            for job, outputs in zip(batch, answers, strict=True):
                if job.future.done():
                    continue
                if isinstance(outputs, str):
                    job.future.set_exception(Refusal(400, f"the model could not run these inputs: {outputs}"))
                    continue
                waited = start - job.arrived
                job.future.set_result(Ran(outputs=outputs, waited=waited, ran=seconds, rows=count, requests=len(batch)))
        finally:
            worker.busy = False
            self._ends.pop(worker, None)
            self.pump()

    def _retry(self, batch: list[_Job], *, counts: bool) -> None:
        """Once more, in front of the others and with the whole bound again; what was lost twice is given up."""
        if not counts:
            for job in reversed(batch):
                self._push(job, first=True)
            return
        for job in reversed(batch):
            if job.future.done():
                continue
            if job.attempts:
                text = "the worker died with this request, twice; it is not tried again"
                job.future.set_exception(Refusal(503, text))
                continue
            job.attempts += 1
            job.deadline = max(job.deadline, time.monotonic() + self._limits.latency_bound)
            job.shapes = (object(),)  # alone: if it is what kills workers, no other request goes with it
            self._push(job, first=True)

    def _arm(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._queues:
            return
        times = [self._latest(head) for head in self._heads() if not head.behind]
        if any(not worker.busy and not worker.ended for worker in self.pool.active):
            times += [ripe for queue in self._queues.values() if (ripe := self._ripe_at(queue)) > now]
        pause = max(min(times, default=now + 1.0) - now, 0.0005)
        self._timer = asyncio.get_running_loop().call_later(pause, self.pump)
