"""The queue in front of the workers. It joins requests into batches and bounds the time that a request takes.

    joined     requests of one model whose shapes differ in the first axis alone, up to `max_batch` rows and an expected
               run time of a quarter of `latency_bound`
    started    when a worker is idle and the batch is full, its oldest request has waited `batch_delay`, or only one
               client seems to be there
    refused    with 429 at once if the answer is expected to take longer than `latency_bound`; with 503 later if a
               request has waited too long to be answered within the bound
    retried    once, if the worker died while it had the request; then 503

Generated text has no bound, as its length is not known. It is refused with 429 or 503 if it would wait, or has waited,
longer than `generation_wait` for a worker. It is not retried once a part of it has been sent.

The run time of a row is a running mean over the batches of its model. Promises add twice the mean deviation, as TCP
does for round trip times.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rsi_deploy.serving.engine.pool import Pool, Worker, WorkerDied
from rsi_deploy.serving.engine.queues import Cost, Queue, QueuedRequest, QueueKey, Queues
from rsi_deploy.serving.language.generation import PendingText, TextPiece
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import RunResult
from rsi_deploy.serving.protocol.signature import Feeds, Outputs, rows

logger = logging.getLogger(__name__)

MAX_WAITING = 4096
MAX_BYTES = 512 << 20
MAX_BACKGROUND = 64
"""Most shadow requests that may wait; more are skipped."""
SINGLE_CLIENT = 0.5
"""Requests are not delayed while the running mean of open requests is below this: there seems to be one client."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """Limits on the size of a batch and on the time of a request.

    Attributes:
        max_batch: most rows of a batch of several requests; 1 joins none. A larger request runs alone.
        batch_delay: seconds that a request waits for others while a worker is idle.
        latency_bound: seconds within which a request must be answered.
        run_timeout: seconds after which a worker counts as hung and is killed.
        generation_wait: seconds within which a worker must begin to generate text.
        token_timeout: seconds without a token after which a worker counts as hung; the first one has the prompt's time.
    """

    max_batch: int = 16
    batch_delay: float = 0.002
    latency_bound: float = 2.0
    run_timeout: float = 60.0
    generation_wait: float = 60.0
    token_timeout: float = 600.0


class Batcher:
    """The scheduler between the queues and the workers.

    Args:
        limits: limits on batches and time.
        on_batch: called with (model key, rows, requests, seconds) after each batch.

    Attributes:
        pool: the workers; set once, before the first request.
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
        self._mean_open = 0.0  # running mean of the requests that were open when a new one came

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a worker."""
        return self._queues.waiting

    async def run(
        self, key: str, feeds: Feeds, *, alone: bool, background: bool = False, generation: PendingText | None = None
    ) -> RunResult:
        """Return the outputs of one request.

        Args:
            key: key of the model.
            feeds: checked inputs.
            alone: whether the request must not be joined with others.
            background: whether it runs only when nothing else waits (a shadow's request), without a deadline.
            generation: text to generate, without feeds; its pieces are delivered, and there are no outputs.

        Raises:
            Refusal: 429 or 503 as described in the module; 400, onnxruntime could not run these inputs.
        """
        size = sum(array.nbytes for array in feeds.values()) if generation is None else generation.request.size
        count = rows(feeds) if generation is None else 1
        bound = self._limits.latency_bound if generation is None else self._limits.generation_wait
        own = self._run_seconds(key, count) if generation is None else 0.0
        self._admit(size, bound, own, background=background)
        shapes = (object(),) if alone else tuple((name, a.shape[1:]) for name, a in sorted(feeds.items()))
        now = time.monotonic()
        job = QueuedRequest(
            key=key,
            feeds=feeds,
            rows=count,
            shapes=shapes,
            arrived=now,
            deadline=math.inf if background else now + bound,
            background=background,
            future=asyncio.get_running_loop().create_future(),
            bytes=size,
            generation=generation,
        )
        self._queues.push(job)
        if not background:
            self._mean_open += 0.1 * (self._open - self._mean_open)
        self._open += not background
        try:
            self.pump()
            return await job.future
        finally:
            self._open -= not background

    def pump(self) -> None:
        """Start the batches that are due, refuse requests that are too late, and set a timer for the next call."""
        now = time.monotonic()
        self._refuse_late(now)
        for worker in (*self.pool.active, *self.pool.retiring):
            if not worker.busy and not worker.ended and (batch := self._next_batch(worker, now)):
                self._start(worker, batch)
        self.pool.retire(lambda worker: any(job.key in worker.keys - self.pool.keys for job in self._queues.heads()))
        self._set_timer(now)

    def _admit(self, size: int, bound: float, own: float, *, background: bool) -> None:
        """Refuse a request of `size` bytes that would not be answered, `own` seconds after its start, in the bound."""
        if background:
            if self._queues.background >= MAX_BACKGROUND:
                raise Refusal(429, "too many shadow requests wait")
            return
        if self._queues.waiting >= MAX_WAITING or self._queues.bytes + size > MAX_BYTES:
            raise Refusal(429, "too many requests wait; try again later", retry_after=1)
        now, workers = time.monotonic(), max(len(self.pool.active), 1)
        ahead = sum(max(end - now, 0.0) for end in self._ends.values())
        ahead += self._queues.seconds_ahead(self._costs)
        expected = ahead / workers + own
        if ahead and expected > bound:
            text = f"the answer would take {expected:.2f} s, more than the bound of {bound:g} s; try again later"
            raise Refusal(429, text, retry_after=max(expected - bound, 1.0))

    def _row_seconds(self, key: str) -> float:
        return self._costs[key].upper_estimate if key in self._costs else 0.0

    def _run_seconds(self, key: str, count: int) -> float:
        """Return the expected run time of a request of `count` rows, in a full batch."""
        return self._row_seconds(key) * max(count, self._max_rows(key))

    def _latest_start(self, job: QueuedRequest) -> float:
        """Return the time by which a request must start; its own run counts as half of the bound at most."""
        if job.generation is not None:
            return job.deadline
        return job.deadline - min(self._run_seconds(job.key, job.rows), self._limits.latency_bound / 2)

    def _max_rows(self, key: str) -> int:
        """Return the most rows of a batch: as many as run in a quarter of the bound, at most `max_batch`."""
        cost = self._row_seconds(key)
        fitting = int(self._limits.latency_bound / 4 / cost) if cost else self._limits.max_batch
        return max(1, min(self._limits.max_batch, fitting))

    def _refuse_late(self, now: float) -> None:
        for queue_key, queue in self._queues:
            while queue.jobs and (queue.head.future.done() or self._latest_start(queue.head) < now):
                job = self._queues.pop(queue_key)
                if not job.future.done():
                    limits = self._limits
                    bound = limits.latency_bound if job.generation is None else limits.generation_wait
                    text = f"no worker was free within the bound of {bound:g} s; try again later"
                    job.future.set_exception(Refusal(503, text, retry_after=1))

    def _next_batch(self, worker: Worker, now: float) -> list[QueuedRequest]:
        """Return the batch that this worker should run now; empty if none is due."""
        active = worker in self.pool.active
        chosen: QueueKey | None = None
        best: tuple[bool, float] = (True, math.inf)
        for queue_key, queue in self._queues:
            head = queue.head
            can_run = head.key in worker.keys and (active or head.key not in self.pool.keys)
            if can_run and (head.background, head.arrived) < best and now >= self._start_time(queue):
                chosen, best = queue_key, (head.background, head.arrived)
        if chosen is None:
            return []
        batch = [self._queues.pop(chosen)]
        count, max_rows = batch[0].rows, self._max_rows(batch[0].key)
        while (rest := self._queues.get(chosen)) and count + rest.head.rows <= max_rows:
            job = self._queues.pop(chosen)
            if not job.future.done():
                batch.append(job)
                count += job.rows
        return batch

    def _start_time(self, queue: Queue) -> float:
        head = queue.head
        full = queue.rows >= self._max_rows(head.key)
        if full or head.alone or self._mean_open < SINGLE_CLIENT:
            return 0.0
        return head.arrived + self._limits.batch_delay

    def _start(self, worker: Worker, batch: list[QueuedRequest]) -> None:
        worker.busy = True
        count = sum(job.rows for job in batch)
        self._ends[worker] = time.monotonic() + self._row_seconds(batch[0].key) * count
        task = asyncio.create_task(self._run(worker, batch, count))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, worker: Worker, batch: list[QueuedRequest], count: int) -> None:
        key, start = batch[0].key, time.monotonic()
        try:
            answers, seconds = await self._answers(worker, batch)
        except WorkerDied as death:
            self._retry(batch, count_attempt=death.had_request)
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
                    what = "the model could not run these inputs: " if job.generation is None else ""
                    job.future.set_exception(Refusal(400, f"{what}{outputs}"))
                    continue
                waited = start - job.arrived
                job.future.set_result(
                    RunResult(outputs=outputs, waited=waited, ran=seconds, rows=count, requests=len(batch))
                )
        finally:
            worker.busy = False
            self._ends.pop(worker, None)
            self.pump()

    async def _answers(self, worker: Worker, batch: list[QueuedRequest]) -> tuple[list[Outputs | str], float]:
        """Return outputs or an error message for each request, and the seconds; text is delivered piece by piece."""
        job, generation = batch[0], batch[0].generation
        if generation is None:
            return await worker.run(job.key, [job.feeds for job in batch], self._limits.run_timeout)

        def wanted(piece: TextPiece) -> bool:
            if not job.future.done():
                generation.deliver(piece)
            return not job.future.done()  # it is cancelled if the client has gone

        (last,), seconds = await worker.generate(job.key, generation.request, wanted, self._limits.token_timeout)
        if isinstance(last, str):
            return [last], seconds
        wanted(last)
        return [{}], seconds

    def _retry(self, batch: list[QueuedRequest], *, count_attempt: bool) -> None:
        """Requeue the requests of a dead worker at the front; fail those for which it is the second dead worker."""
        for job in reversed(batch):
            is_started = job.generation is not None and job.generation.started
            if not count_attempt and not is_started:
                self._queues.push(job, first=True)
                continue
            if job.future.done():
                continue
            if job.attempts or is_started:
                text = "the worker died twice while it had this request; it is not tried again"
                if is_started:
                    text = "the worker died while it generated this text; send the request again"
                job.future.set_exception(Refusal(503, text))
                continue
            job.attempts += 1
            job.deadline = max(job.deadline, time.monotonic() + self._limits.latency_bound)
            job.shapes = (object(),)  # alone: if this request kills workers, no other one is lost with it
            self._queues.push(job, first=True)

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not (heads := self._queues.heads()):
            return
        times = [self._latest_start(head) for head in heads if not head.background]
        if any(not worker.busy and not worker.ended for worker in self.pool.active):
            times += [ripe for _, queue in self._queues if (ripe := self._start_time(queue)) > now]
        pause = max(min(times, default=now + 1.0) - now, 0.0005)
        self._timer = asyncio.get_running_loop().call_later(pause, self.pump)
