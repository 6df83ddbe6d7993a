"""What both transports call: which model answers, on which worker, and what is noted of it."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.serving.catalog import Catalog, Route, Served, all_served, replaced
from rsi_deploy.serving.engine.batches import Batcher, BatchLimits
from rsi_deploy.serving.engine.pool import Pool
from rsi_deploy.serving.engine.worker import Loaded
from rsi_deploy.serving.metrics import Metrics
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest, InferResponse, Ran
from rsi_deploy.serving.protocol.signature import Outputs
from rsi_deploy.serving.shadow import Shadow

logger = logging.getLogger(__name__)


class Service:
    """The models behind their names.

    Args:
        routes: what is served.
        limits: of batches and time.
        workers: how many processes.
        threads: of each.
        provider: of onnxruntime.

    Attributes:
        routes: name -> what answers it.
        metrics: what is counted.
        leaving: the server will end: it says that it is not ready, and lets connections go after their answer.
        accepting: whether requests are taken; False where only those that were taken are still answered.
        shadows: name -> comparison with its shadow.
    """

    def __init__(self, routes: Catalog, limits: BatchLimits, *, workers: int, threads: int, provider: str):
        self.routes, self.metrics = routes, Metrics()
        self.accepting, self.leaving = True, False
        self._batcher = Batcher(limits, self._note_batch)
        self._pool = self._batcher.pool = Pool(workers, provider, threads, self._changed)
        self._loaded: dict[str, Loaded] = {}
        self._labels: dict[str, tuple[str, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.shadows: dict[str, Shadow] = {}

    async def start(self) -> None:
        """Load every model on every worker; those that cannot be loaded are taken out, where others can.

        Raises:
            UsageError, ModelError, GateError: none can be loaded.
        """
        wanted = {served.key: served for served in all_served(self.routes)}
        for key, error in (await self._load(list(wanted.values()), all_or_none=False)).items():
            self.routes.refuse(wanted[key].name, wanted[key].version, error)
        self.routes.check_any()
        self.shadows = {name: Shadow(r.main, r.shadow) for name, r in self.routes.items() if r.shadow}
        for served in all_served(self.routes):
            if why := self._loaded[served.key].alone:
                logger.warning("%s %s: requests are not batched: %s", served.name, served.version, why)

    async def close(self) -> None:
        """End the workers."""
        await self._pool.close()

    @property
    def ready(self) -> bool:
        """Whether requests are taken and a worker can answer them."""
        return not self.leaving and bool(self._pool.active)

    def find(self, name: str, version: str) -> Served:
        """What a name and version stand for; no canary gets a share of this.

        Raises:
            Refusal: 404.
        """
        route = self._route(name)
        return route.pick(version or route.main)

    def loaded(self, served: Served) -> Loaded:
        """What the workers said of it."""
        return self._loaded[served.key]

    def can_answer(self, served: Served) -> bool:
        """Whether a worker has it in memory."""
        return not self.leaving and any(served.key in worker.keys for worker in self._pool.active)

    async def infer(self, name: str, version: str, request: InferRequest) -> InferResponse:
        """The answer to one request.

        Raises:
            Refusal: it gets none, with the reason.
        """
        route = self._route(name)
        served = route.pick(version)
        loaded = self._loaded[served.key]
        loaded.signature.check(request.feeds, name)
        loaded.signature.check_outputs(tuple(request.outputs), name)
        if not self.accepting:
            raise Refusal(503, "the server is shutting down; try another one", retry_after=1)
        ran = await self._batcher.run(served.key, request.feeds, alone=bool(loaded.alone))
        if route.shadow and not version and served.version == route.main:
            self._shadow(route, request, ran)
        wanted = tuple(request.outputs) or tuple(ran.outputs)
        return InferResponse(
            name=name,
            version=served.version,
            signature=loaded.signature,
            outputs={output: ran.outputs[output] for output in wanted},
            waited=ran.waited,
            ran=ran.ran,
            rows=ran.rows,
        )

    async def reload(self, changed: Mapping[str, Served]) -> None:
        """Serve the files that are now at the paths of some of what is served, once all of it is loaded.

        Args:
            changed: by key; those whose files have been replaced.

        Raises:
            UsageError, ModelError, GateError: they cannot be served; what was served before goes on.
        """
        fresh = {key: await asyncio.to_thread(replaced, served) for key, served in changed.items()}
        await self._load([fresh.get(served.key, served) for served in all_served(self.routes)])
        for served in fresh.values():
            route = self.routes[served.name]
            route.versions[served.version] = served
            if route.shadow:  # what was compared so far was between other files
                self.shadows[route.name] = Shadow(route.main, route.shadow)

    async def compared(self, name: str) -> dict[str, Any]:
        """How the shadow of a model compares so far.

        Raises:
            Refusal: 404, no such model, or none beside it.
        """
        self._route(name)
        if name not in self.shadows:
            raise Refusal(404, f"model {name} has no shadow; start the server with --shadow {name}=DIR")
        return self.shadows[name].told()

    async def measured(self) -> bytes:
        """The metrics in Prometheus' text format."""
        for name, shadow in self.shadows.items():
            self.metrics.note_shadow(name, shadow)
        self.metrics.note_state(self._batcher.waiting, len(self._pool.active), self._pool.restarts)
        return self.metrics.text()

    def worker_pids(self) -> list[int]:
        """Of the workers that take requests."""
        return [worker.pid for worker in self._pool.active]

    async def _load(self, wanted: list[Served], *, all_or_none: bool = True) -> Mapping[str, RsiDeployError]:
        """Have workers with these models; the reasons of those that they have not."""
        bundles = {served.key: served.bundle for served in wanted}
        said, refused = await self._pool.exchange(bundles, all_or_none=all_or_none)
        self._loaded |= said
        self._labels |= {served.key: (served.name, served.version) for served in wanted}
        return refused

    def _route(self, name: str) -> Route:
        if name not in self.routes:
            raise Refusal(404, f"no model {name[:80]!r} is served; there are {', '.join(self.routes)}")
        return self.routes[name]

    def _shadow(self, route: Route, request: InferRequest, ran: Ran) -> None:
        task = asyncio.create_task(self._run_shadow(route, request, ran.outputs, ran.ran / ran.requests))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_shadow(self, route: Route, request: InferRequest, outputs: Outputs, seconds: float) -> None:
        served, shadow = route.versions[route.shadow], self.shadows[route.name]
        loaded = self._loaded[served.key]
        try:
            loaded.signature.check(request.feeds, route.name)
            ran = await self._batcher.run(served.key, request.feeds, alone=bool(loaded.alone), behind=True)
            shadow.compare(request.feeds, outputs, ran.outputs, (seconds, ran.ran / ran.requests))
        except (Refusal, RsiDeployError) as error:
            shadow.skipped += 1
            logger.info("shadow of %s: %s", route.name, error)

    def _note_batch(self, key: str, rows: int, requests: int, seconds: float) -> None:
        self.metrics.note_batch(*self._labels[key], rows=rows, requests=requests, seconds=seconds)

    def _changed(self) -> None:
        self._batcher.pump()
