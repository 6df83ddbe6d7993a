"""The pool of worker processes. It restarts workers that die and replaces all of them when a bundle changes.

A worker loads its models once. For new files, new workers are started while the old ones still serve. The new ones take
over when all of them are ready, and the old ones end when they have answered what was accepted for the old files.
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
from rsi_deploy.serving.engine.worker import COMMAND, Loaded, LoadRequest, NotLoaded
from rsi_deploy.serving.language.generation import TextPiece, TextRequest

logger = logging.getLogger(__name__)

HOME = Path(rsi_deploy.__file__).parents[1]
LOAD_TIMEOUT = 600.0
SLOWEST_RESTART = 5.0
STABLE_SECONDS = 10.0
"""A worker that lived longer than this is restarted without a pause."""


class WorkerDied(Exception):  # noqa: N818 - an event, not an error
    """The worker process ended before it answered.

    Args:
        had_request: whether it may have read the request. (Linux resets a socket that is closed with unread data.)
    """

    def __init__(self, *, had_request: bool = True):
        super().__init__()
        self.had_request = had_request


class Worker:
    """A worker process, seen from the front process.

    Args:
        request: the models that it loads.
        on_end: called once, when the process has ended.

    Attributes:
        busy: whether it runs a batch.
        keys: keys of the models that it has loaded; empty until it is ready.
        results: key -> result of loading that model.
    """

    def __init__(self, request: LoadRequest, on_end: "Callable[[Worker], None]"):
        ours, theirs = socket.socketpair()
        # -P: modules in the current folder must not be imported by accident.
        command = [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno()), str(HOME)]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        ours.setblocking(False)
        self._sock, self._request, self._on_end = ours, request, on_end
        self._answer: asyncio.Future[Any] | None = None
        self._reader: asyncio.Task[None] | None = None
        self.started, self.busy, self.ended = time.monotonic(), False, False
        self.keys: frozenset[str] = frozenset()
        self.results: Mapping[str, Loaded | NotLoaded] = {}

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def load(self) -> None:
        """Wait until it is ready.

        Raises:
            WorkerDied: it ended before, or took too long.
        """
        self._reader = asyncio.create_task(self._read())
        self.results = await self._send(self._request, LOAD_TIMEOUT)
        self.keys = frozenset(key for key, result in self.results.items() if isinstance(result, Loaded))

    async def run(self, key: str, requests: Sequence[Mapping[str, Any]], timeout: float) -> tuple[list[Any], float]:
        """Run a batch; return the outputs or the error message of each request, and the seconds.

        Raises:
            WorkerDied: it ended before, or was killed because it took longer than `timeout`.
        """
        answer: tuple[list[Any], float] = await self._send((key, list(requests)), timeout)
        return answer

    async def generate(
        self, key: str, request: TextRequest, wanted: Callable[[TextPiece], bool], timeout: float
    ) -> tuple[list[Any], float]:
        """Generate text; return its last piece or the error message in a list, and the seconds.

        Args:
            key: key of the model.
            request: what to generate.
            wanted: called with each piece but the last; returns whether to go on.
            timeout: seconds without a piece after which the worker counts as hung.

        Raises:
            WorkerDied: it ended before, or was killed because a piece took longer than `timeout`.
        """
        reply = await self._send((key, request), timeout)
        while isinstance(reply, TextPiece):
            reply = await self._send(wanted(reply), timeout)
        answer: tuple[list[Any], float] = reply
        return answer

    def close(self) -> None:
        """End the process: by closing its socket, or by a kill if it runs a batch."""
        if self.busy:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _send(self, message: Any, timeout: float) -> Any:
        if self.ended:
            raise WorkerDied(had_request=False)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                try:
                    await send_frame_async(self._sock, message)
                except OSError:
                    self.ended = True
                    raise WorkerDied(had_request=False) from None
                return await self._answer
        except TimeoutError:
            logger.error("worker %d did not answer in %.0f s and is killed", self.pid, timeout)
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
            death = WorkerDied(had_request=False)
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
    """A fixed number of workers, all with the same models.

    Args:
        count: number of workers.
        provider: onnxruntime provider.
        threads: threads of each worker.
        on_change: called when a worker has become ready or has ended.

    Attributes:
        active: the workers that take new requests.
        retiring: workers with replaced files, which finish the requests that were accepted for them.
        restarts: number of restarts of dead workers.
    """

    def __init__(self, count: int, provider: str, threads: int, on_change: Callable[[], None]):
        self._count, self._provider, self._threads, self._on_change = count, provider, threads, on_change
        self._request = LoadRequest(bundles={}, provider=provider, threads=threads)
        self._quick_deaths = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.active: list[Worker] = []
        self.retiring: list[Worker] = []
        self.restarts = 0

    @property
    def keys(self) -> frozenset[str]:
        """Keys of the models that are served now, even while no worker is alive."""
        return frozenset(self._request.bundles)

    async def exchange(
        self, bundles: Mapping[str, Bundle], *, all_or_none: bool = True
    ) -> tuple[Mapping[str, Loaded], Mapping[str, RsiDeployError]]:
        """Start workers with these models; they take over when all of them are ready.

        Args:
            bundles: key -> bundle.
            all_or_none: whether to keep the old workers if any model cannot be loaded.

        Returns:
            key -> loaded model; key -> error of a model that could not be loaded.

        Raises:
            UsageError, ModelError, GateError: a model cannot be loaded; the old workers still serve.
        """
        request = LoadRequest(bundles=bundles, provider=self._provider, threads=self._threads)
        keys = list(bundles)
        shares = [frozenset(keys[index :: self._count]) for index in range(self._count)]  # each tests some for all
        fresh = [Worker(dataclasses.replace(request, try_batches=share), self._ended) for share in shares]
        try:
            await asyncio.gather(*(worker.load() for worker in fresh))
            refused = _refused([worker.results for worker in fresh])
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
        self._request = dataclasses.replace(request, bundles=loaded)
        self.active, self.retiring = fresh, [*self.retiring, *self.active]
        self._on_change()
        results = {key: fresh[index % self._count].results[key] for index, key in enumerate(keys)}
        return {key: result for key, result in results.items() if isinstance(result, Loaded)}, refused

    def retire(self, needed: Callable[[Worker], bool]) -> None:
        """End the retiring workers that are idle and no longer `needed`."""
        for worker in [w for w in self.retiring if not w.busy and not needed(w)]:
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
        """Start a worker in place of a dead one, after a pause that grows while workers die soon after their start."""
        lived = time.monotonic() - dead.started
        logger.error("worker %d has died after %.1f s; another one is started", dead.pid, lived)
        self._quick_deaths = 0 if lived > STABLE_SECONDS else self._quick_deaths + 1
        request = self._request
        while request is self._request:  # after an exchange, the new workers are complete without this one
            if self._quick_deaths > self._count:
                await asyncio.sleep(min(0.1 * 2 ** min(self._quick_deaths - self._count, 10), SLOWEST_RESTART))
            self.restarts += 1
            try:
                worker = Worker(request, self._ended)
                await worker.load()
            except (WorkerDied, OSError) as error:  # OSError: out of processes or sockets
                logger.error("a worker could not be started: %s", str(error) or "it died while it loaded the models")
                self._quick_deaths += 1
                continue
            self._add(worker, request)
            return

    def _add(self, worker: Worker, request: LoadRequest) -> None:
        """Make a restarted worker active, unless its models have been replaced since."""
        if request is not self._request:
            worker.close()
            return
        for key, result in worker.results.items():
            if isinstance(result, NotLoaded):
                logger.error("worker %d does not serve %s: %s", worker.pid, key, result.message)
        self.active.append(worker)
        self._on_change()


def _refused(workers: Sequence[Mapping[str, Loaded | NotLoaded]]) -> dict[str, RsiDeployError]:
    """Return key -> error of each model that a worker could not load."""
    kinds: dict[int, type[RsiDeployError]] = {kind.exit_code: kind for kind in (UsageError, ModelError, GateError)}
    return {
        key: kinds.get(result.exit_code, ModelError)(result.message)
        for results in reversed(workers)
        for key, result in results.items()
        if isinstance(result, NotLoaded)
    }
