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
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rsi_deploy.serving.engine.pool import Pool, Worker, WorkerDied
from rsi_deploy.serving.engine.queues import Cost, Place, Queue, QueuedRequest, Queues
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import Ran
from rsi_deploy.serving.protocol.signature import Feeds, rows

logger = logging.getLogger(__name__)

MOST_WAITING = 4096
MOST_BYTES = 512 << 20
MOST_BEHIND = 64
"""Shadow requests that wait at most; more are left out."""
LONELY = 0.5
"""Requests of a lone client wait for nobody: others at work or waiting when one comes, a running mean."""


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
        self._queues = Queues()
        self._costs: dict[str, Cost] = {}
        self._ends: dict[Worker, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = 0
        self._company = 0.0  # requests that a new one has found at work or waiting, a running mean

    @property
    def waiting(self) -> int:
        """Requests that wait for a worker."""
        return self._queues.waiting

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
        job = QueuedRequest(
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
        self._queues.push(job)
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
        self.pool.retire(lambda worker: any(job.key in worker.keys - self.pool.keys for job in self._queues.heads()))
        self._arm(now)

    def _admit(self, key: str, count: int, size: int, behind: bool) -> None:
        if behind:
            if self._queues.behind >= MOST_BEHIND:
                raise Refusal(429, "too many shadow requests wait")
            return
        if self._queues.waiting >= MOST_WAITING or self._queues.bytes + size > MOST_BYTES:
            raise Refusal(429, "too many requests wait; try again later", retry_after=1)
        now, workers = time.monotonic(), max(len(self.pool.active), 1)
        ahead = sum(max(end - now, 0.0) for end in self._ends.values())
        ahead += self._queues.seconds_ahead(self._costs)
        own = self._a_row(key) * max(count, self._most_rows(key))
        expected = ahead / workers + own
        bound = self._limits.latency_bound
        if ahead and expected > bound:
            text = f"the work ahead takes {expected:.2f} s, more than the bound of {bound:g} s; try again later"
            raise Refusal(429, text, retry_after=max(expected - bound, 1.0))

    def _a_row(self, key: str) -> float:
        return self._costs[key].likely_most if key in self._costs else 0.0

    def _latest(self, job: QueuedRequest) -> float:
        """When a job must start to be answered in time; one that takes most of the bound itself has half of it."""
        own = self._a_row(job.key) * max(job.rows, self._most_rows(job.key))
        return job.deadline - min(own, self._limits.latency_bound / 2)

    def _most_rows(self, key: str) -> int:
        """Rows of a batch: what the limits allow, and what is expected to run in a quarter of the bound."""
        cost = self._a_row(key)
        fitting = int(self._limits.latency_bound / 4 / cost) if cost else self._limits.max_batch
        return max(1, min(self._limits.max_batch, fitting))

    def _drop_old(self, now: float) -> None:
        for place, queue in self._queues:
            while queue.jobs and (queue.head.future.done() or self._latest(queue.head) < now):
                job = self._queues.pop(place)
                if not job.future.done():
                    text = f"no worker was free within the bound of {self._limits.latency_bound:g} s; try again later"
                    job.future.set_exception(Refusal(503, text, retry_after=1))

    def _ripe(self, worker: Worker, now: float) -> list[QueuedRequest]:
        """The batch that this worker should run now; empty where none is ripe."""
        fresh = worker in self.pool.active
        chosen: Place | None = None
        best: tuple[bool, float] = (True, math.inf)
        for place, queue in self._queues:
            head = queue.head
            takes = head.key in worker.keys and (fresh or head.key not in self.pool.keys)
            if takes and (head.behind, head.arrived) < best and now >= self._ripe_at(queue):
                chosen, best = place, (head.behind, head.arrived)
        if chosen is None:
            return []
        batch = [self._queues.pop(chosen)]
        count, most = batch[0].rows, self._most_rows(batch[0].key)
        while (rest := self._queues.get(chosen)) and count + rest.head.rows <= most:
            job = self._queues.pop(chosen)
            if not job.future.done():
                batch.append(job)
                count += job.rows
        return batch

    def _ripe_at(self, queue: Queue) -> float:
        head = queue.head
        full = queue.rows >= self._most_rows(head.key)
        if full or head.alone or self._company < LONELY:
            return 0.0
        return head.arrived + self._limits.batch_delay

    def _start(self, worker: Worker, batch: list[QueuedRequest]) -> None:
        worker.busy = True
        count = sum(job.rows for job in batch)
        self._ends[worker] = time.monotonic() + self._a_row(batch[0].key) * count
        task = asyncio.create_task(self._run(worker, batch, count))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, worker: Worker, batch: list[QueuedRequest], count: int) -> None:
        key, start = batch[0].key, time.monotonic()
        try:
            answers, seconds = await worker.run(key, [job.feeds for job in batch], self._limits.run_timeout)
        except WorkerDied as death:
            self._retry(batch, counts=death.had_it)
        except Exception:
            logger.exception("a batch of %s", key)
            for job in batch:
                if not job.future.done():
                    job.future.set_exception(Refusal(500, "the server failed; its log says why"))
        else:
            self._costs.setdefault(key, Cost()).note(seconds, count)
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

    def _retry(self, batch: list[QueuedRequest], *, counts: bool) -> None:
        """Once more, in front of the others and with the whole bound again; what was lost twice is given up."""
        if not counts:
            for job in reversed(batch):
                self._queues.push(job, first=True)
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
            self._queues.push(job, first=True)

    def _arm(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not (heads := self._queues.heads()):
            return
        times = [self._latest(head) for head in heads if not head.behind]
        if any(not worker.busy and not worker.ended for worker in self.pool.active):
            times += [ripe for _, queue in self._queues if (ripe := self._ripe_at(queue)) > now]
        pause = max(min(times, default=now + 1.0) - now, 0.0005)
        self._timer = asyncio.get_running_loop().call_later(pause, self.pump)
