"""The worker processes: started, watched, started again when they die, and exchanged whole when a bundle changes.

Workers never load anything twice. New files mean new workers: they load beside the old ones, take over when all of them
are ready, and the old ones end when they have answered what was accepted for the old files.
"""

import asyncio
import contextlib
import dataclasses
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rsi_deploy
from rsi_deploy.core.errors import GateError, ModelError, RsiDeployError, UsageError
from rsi_deploy.serving.bundles import Bundle
from rsi_deploy.serving.engine.frames import receive_frame_async, send_frame_async
from rsi_deploy.serving.engine.worker import COMMAND, Loaded, LoadOrder, NotLoaded

logger = logging.getLogger(__name__)

HOME = Path(rsi_deploy.__file__).parents[1]
LOAD_TIMEOUT = 600.0
SLOWEST_RESTART = 5.0
STABLE_SECONDS = 10.0
"""A worker that lived so long is started again at once."""


class WorkerDied(Exception):  # noqa: N818 - an event, not a mistake
    """The process ended before it answered.

    Args:
        had_it: whether it may have read the request. Linux reports a socket that is closed with unread data as reset.
    """

    def __init__(self, *, had_it: bool = True):
        super().__init__()
        self.had_it = had_it


class Worker:
    """One process.

    Args:
        order: what it loads.
        on_end: called once, when it has ended, for whatever reason.

    Attributes:
        busy: whether it has a batch.
        keys: what it can answer; empty until it is ready.
        said: key -> what it said when it was ready.
    """

    def __init__(self, order: LoadOrder, on_end: "Callable[[Worker], None]"):
        ours, theirs = socket.socketpair()
        # -P: what lies in the current folder is nobody's business, whatever it is called.
        command = [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno()), str(HOME)]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        ours.setblocking(False)
        self._sock, self._order, self._on_end = ours, order, on_end
        self._answer: asyncio.Future[Any] | None = None
        self._reader: asyncio.Task[None] | None = None
        self.started, self.busy, self.ended = time.monotonic(), False, False
        self.keys: frozenset[str] = frozenset()
        self.said: Mapping[str, Loaded | NotLoaded] = {}

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def load(self) -> None:
        """Wait until it is ready.

        Raises:
            WorkerDied: it ended instead, or took too long.
        """
        self._reader = asyncio.create_task(self._read())
        self.said = await self._ask(self._order, LOAD_TIMEOUT)
        self.keys = frozenset(key for key, said in self.said.items() if isinstance(said, Loaded))

    async def run(self, key: str, requests: Sequence[Mapping[str, Any]], timeout: float) -> tuple[list[Any], float]:
        """The worker's answers to a batch, and the seconds it took.

        Raises:
            WorkerDied: it ended first, or was killed because it took longer than `timeout`.
        """
        found: tuple[list[Any], float] = await self._ask((key, list(requests)), timeout)
        return found

    def close(self) -> None:
        """Let it end: it reads the end of its socket. One that is at work is killed."""
        if self.busy:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _ask(self, message: Any, timeout: float) -> Any:
        if self.ended:
            raise WorkerDied(had_it=False)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                try:
                    await send_frame_async(self._sock, message)
                except OSError:
                    self.ended = True
                    raise WorkerDied(had_it=False) from None
                return await self._answer
        except TimeoutError:
            logger.error("worker %d gave no answer in %.0f s and is killed", self.pid, timeout)
            self._process.kill()
            self.ended = True
            raise WorkerDied from None
        finally:
            self._answer = None

    async def _read(self) -> None:
        death = WorkerDied()
        try:
            while True:
                frame = await receive_frame_async(self._sock)
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(frame)
        except ConnectionResetError:
            death = WorkerDied(had_it=False)
        except (EOFError, OSError):
            pass
        finally:
            self.ended, self.keys = True, frozenset()
            if self._answer is not None and not self._answer.done():
                self._answer.set_exception(death)
            self._sock.close()
            self._on_end(self)
            await asyncio.to_thread(self._process.wait)


class Pool:
    """As many workers as there should be, all with the same models.

    Args:
        count: of workers.
        provider: of onnxruntime.
        threads: of each worker.
        on_change: called whenever a worker has become ready or has ended.

    Attributes:
        active: the workers that take new requests.
        retiring: those that only finish what was accepted for files that are no longer served.
        restarts: how often a worker had to be started again.
    """

    def __init__(self, count: int, provider: str, threads: int, on_change: Callable[[], None]):
        self._count, self._provider, self._threads, self._on_change = count, provider, threads, on_change
        self._order = LoadOrder(bundles={}, provider=provider, threads=threads)
        self._quick_deaths = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.active: list[Worker] = []
        self.retiring: list[Worker] = []
        self.restarts = 0

    @property
    def keys(self) -> frozenset[str]:
        """What is served now, whether or not a worker lives."""
        return frozenset(self._order.bundles)

    async def exchange(
        self, bundles: Mapping[str, Bundle], *, all_or_none: bool = True
    ) -> tuple[Mapping[str, Loaded], Mapping[str, RsiDeployError]]:
        """Start workers with these models and let them take over when all are ready.

        Args:
            bundles: key -> model.
            all_or_none: let them take over only where they have loaded every model.

        Returns:
            key -> what they say of it; key -> why it could not be loaded.

        Raises:
            UsageError, ModelError, GateError: a model cannot be loaded; the workers there were go on.
        """
        order = LoadOrder(bundles=bundles, provider=self._provider, threads=self._threads)
        keys = list(bundles)
        shares = [frozenset(keys[place :: self._count]) for place in range(self._count)]  # each tries some for all
        fresh = [Worker(dataclasses.replace(order, try_batches=share), self._ended) for share in shares]
        try:
            await asyncio.gather(*(worker.load() for worker in fresh))
            refused = _refused([worker.said for worker in fresh])
            if refused and (all_or_none or len(refused) == len(bundles)):
                first_refusal = next(iter(refused.values()))
                raise first_refusal
        except BaseException as error:
            for worker in fresh:
                worker.close()
            if isinstance(error, WorkerDied):
                raise ModelError(
                    "a worker ended while it loaded the models; serve fewer at a time, or give it more memory"
                ) from error
            raise
        loaded = {key: bundle for key, bundle in bundles.items() if key not in refused}
        self._order = dataclasses.replace(order, bundles=loaded)
        self.active, self.retiring = fresh, [*self.retiring, *self.active]
        self._on_change()
        said = {key: fresh[place % self._count].said[key] for place, key in enumerate(keys)}
        return {key: answer for key, answer in said.items() if isinstance(answer, Loaded)}, refused

    def retire(self, wanted: Callable[[Worker], bool]) -> None:
        """End the retiring workers that are idle and not `wanted` any more."""
        for worker in [w for w in self.retiring if not w.busy and not wanted(w)]:
            self.retiring.remove(worker)
            worker.close()

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for worker in (*self.active, *self.retiring):
            worker.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                while any(not worker.ended for worker in (*self.active, *self.retiring)):
                    await asyncio.sleep(0.01)

    def _ended(self, worker: Worker) -> None:
        if worker in self.retiring:
            self.retiring.remove(worker)
        if worker in self.active and not self._closed:
            self.active.remove(worker)
            task = asyncio.create_task(self._restart(worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._on_change()

    async def _restart(self, dead: Worker) -> None:
        """Start a worker in the place of one that died; the quicker they die, the longer the pause."""
        lived = time.monotonic() - dead.started
        logger.error("worker %d has died after %.1f s; another one is started", dead.pid, lived)
        self._quick_deaths = 0 if lived > STABLE_SECONDS else self._quick_deaths + 1
        order = self._order
        while order is self._order:  # exchanged meanwhile, the new ones are complete without it
            if self._quick_deaths > self._count:
                await asyncio.sleep(min(0.1 * 2 ** min(self._quick_deaths - self._count, 10), SLOWEST_RESTART))
            self.restarts += 1
            try:
                worker = Worker(order, self._ended)
                await worker.load()
            except (WorkerDied, OSError) as error:  # OSError: no process or socket to be had now
                logger.error("a worker could not be started: %s", str(error) or "it died while it loaded the models")
                self._quick_deaths += 1
                continue
            self._take(worker, order)
            return

    def _take(self, worker: Worker, order: LoadOrder) -> None:
        """Let a worker that was started again take requests, unless it holds what is no longer served."""
        if order is not self._order:
            worker.close()
            return
        for key, said in worker.said.items():
            if isinstance(said, NotLoaded):
                logger.error("worker %d does not serve %s: %s", worker.pid, key, said.message)
        self.active.append(worker)
        self._on_change()


def _refused(workers: Sequence[Mapping[str, Loaded | NotLoaded]]) -> dict[str, RsiDeployError]:
    """Why a worker could not load a model, as the error it was there."""
    kinds: dict[int, type[RsiDeployError]] = {kind.exit_code: kind for kind in (UsageError, ModelError, GateError)}
    return {
        key: kinds.get(answer.exit_code, ModelError)(answer.message)
        for said in reversed(workers)
        for key, answer in said.items()
        if isinstance(answer, NotLoaded)
    }
