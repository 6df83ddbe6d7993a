"""The service as a Ray Serve application. Each replica is a whole server without listening sockets.

    client --HTTP, gRPC--> Ray Serve's proxy --> a replica: protocol, routes, batches --> its worker process
                                                 Board: the counts of all replicas

Ray Serve owns the sockets, scales the number of replicas with the load and replaces replicas that die. Everything else
is the code of `rsi-deploy serve`. The config for `serve deploy` names `build`, whose `args` are `RayAppSettings`.

Ray's proxy answers the requests of a replica that died with 500. They are not retried, because one of them may be the
cause.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from io import RawIOBase
from typing import Annotated, Any, Literal

import pydantic
from starlette.applications import Starlette

from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.serving import KEY_VARIABLE
from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.catalog import Catalog, all_versions, read_catalog
from rsi_deploy.serving.engine.batches import MAX_WAITING, BatchLimits
from rsi_deploy.serving.ray.grpc import METHODS
from rsi_deploy.serving.replica_counts import Board, ReplicaCounts, joined_metrics
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.shadow import Shadow
from rsi_deploy.serving.transports.common import Access
from rsi_deploy.serving.transports.grpc_app import grpc_calls
from rsi_deploy.serving.transports.http_app import http_app
from rsi_deploy.serving.watching import watch

SHARE_SECONDS = 1.0
STDERR = 2  # the descriptor, because Ray may replace sys.stderr

Positive = Annotated[float, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=1)]


class RayAppSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The settings of the application: the `args` in a config.

    Attributes:
        models: texts `[NAME[:VERSION]=]PATH`; every node with a replica must have the files there.
        canary, canary_share, shadow: as for `rsi_deploy.serve`.
        replicas: fewest and most replicas.
        threads: threads of each replica, and the number of CPUs it takes on its node.
        max_batch, batch_delay, latency_bound: limits of batches, in rows and seconds.
        max_body, max_json: most bytes of a request, and of the JSON in it.
        access_log: "-" for the replica's stderr, which Ray keeps with its logs, or "off".
        reload_seconds: seconds between a replica's checks for replaced files; 0 disables them.
        drain_seconds: seconds that a replica has to answer its accepted requests before it ends.
        api_key: key that clients must send; never written into a config.
        needs_key: whether a key is required; with a config it is read from $RSI_DEPLOY_API_KEY of the replica.
    """

    models: tuple[str, ...]
    canary: str = ""
    canary_share: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    shadow: str = ""
    replicas: tuple[Annotated[int, pydantic.Field(ge=0)], Count] = (1, 4)
    threads: Count = 1
    max_batch: Count = 16
    batch_delay: Annotated[float, pydantic.Field(ge=0)] = 0.002
    latency_bound: Positive = 2.0
    max_body: Count = 64 << 20
    max_json: Count = 8 << 20
    access_log: Literal["-", "off"] = "-"
    reload_seconds: Annotated[float, pydantic.Field(ge=0)] = 1.0
    drain_seconds: Positive = 30.0
    api_key: Annotated[str, pydantic.Field(repr=False)] = ""
    needs_key: bool = False

    @property
    def limits(self) -> BatchLimits:
        """Limits on batches and time."""
        return BatchLimits(max_batch=self.max_batch, batch_delay=self.batch_delay, latency_bound=self.latency_bound)

    @property
    def longest(self) -> float:
        """Seconds of two complete attempts, after which a request will never be answered."""
        return 2 * (self.latency_bound + self.limits.run_timeout)

    def catalog(self) -> Catalog:
        """Return the models, after a check of every bundle.

        Raises:
            UsageError, ModelError, GateError: as `read_catalog`.
        """
        found = read_catalog(self.models, canary=self.canary, canary_share=self.canary_share, shadow=self.shadow)
        if names := sorted({served.name for served in all_versions(found) if served.is_decoder}):
            raise UsageError(f"--engine ray serves no decoders, such as {', '.join(names)}; leave out --engine ray")
        return found


def read_settings(args: Mapping[str, Any]) -> RayAppSettings:
    """Return the settings in the `args` of a config or of a caller.

    Raises:
        UsageError: a setting is invalid.
    """
    try:
        return RayAppSettings.model_validate(args)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"args: {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            "rsi-deploy serve --engine ray --write-config writes valid ones"
        ) from error


class ReplicaService(Service):
    """The service of one replica, whose metrics and comparisons are those of all replicas.

    Args:
        settings: settings of the application.
        exchange: function that stores this replica's counts on the board and returns those of all replicas.
    """

    def __init__(
        self, settings: RayAppSettings, exchange: Callable[[ReplicaCounts], Awaitable[Mapping[str, ReplicaCounts]]]
    ):
        super().__init__(settings.catalog(), settings.limits, workers=1, threads=settings.threads, provider="cpu")
        self._exchange = exchange

    async def exchange_counts(self) -> Mapping[str, ReplicaCounts]:
        """Store the counts of this replica on the board and return those of all replicas."""
        shadows = {name: Shadow.joined([shadow]) for name, shadow in self.shadows.items()}  # a copy to send
        return await self._exchange(ReplicaCounts(metrics=await super().metrics_text(), shadows=shadows))

    async def shadow_summary(self, name: str) -> dict[str, Any]:
        """Return the comparison of a model with its shadow, over all replicas.

        Raises:
            Refusal: 404, there is no such model, or it has no shadow.
        """
        await super().shadow_summary(name)
        counts = (await self.exchange_counts()).values()
        return Shadow.joined([one.shadows[name] for one in counts if name in one.shadows]).summary()

    async def metrics_text(self) -> bytes:
        """Return the metrics of all replicas, each with its label `replica`."""
        return joined_metrics({name: counts.metrics for name, counts in (await self.exchange_counts()).items()})


_replicas: "list[Replica]" = []
"""The one replica of this process. Ray Serve gives its ASGI application no other access to it."""


class Replica:
    """A replica, started by Ray.

    Args:
        args: `RayAppSettings` as a mapping.
        board: Ray's handle of the `Board`.

    Raises:
        RsiDeployError: a bundle has missing or changed files, or the API key is missing.
    """

    def __init__(self, args: Mapping[str, Any], board: Any):
        settings = read_settings(args)
        key = settings.api_key or (os.environ.get(KEY_VARIABLE, "") if settings.needs_key else "")
        if settings.needs_key and not key:
            raise UsageError(
                f"an API key is required, but ${KEY_VARIABLE} is not set where the replicas run; set it there"
            )
        self._settings, self._board = settings, board
        self._service = ReplicaService(settings, self._exchange)
        self._log = AccessLog(None if settings.access_log == "off" else _stderr())
        access = Access(api_key=key, max_body=settings.max_body, max_json=settings.max_json)
        self.http = http_app(self._service, access, self._log, self._lifespan)
        self.grpc = grpc_calls(self._service, access, self._log)
        _replicas[:] = [self]

    async def check_health(self) -> None:
        """Check the worker process. Ray calls this regularly and replaces a replica that fails several times.

        Raises:
            RsiDeployError: no worker process is alive.
        """
        if not self._service.ready:
            raise RsiDeployError("the worker process has died; another one is being started")

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Start the service before the first request and close it after the last one."""
        await self._service.start()
        tasks = [asyncio.create_task(self._exchange_regularly())]
        if self._settings.reload_seconds:
            tasks.append(asyncio.create_task(watch(self._service, self._settings.reload_seconds)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await self._service.close()
            self._log.close()

    async def _exchange_regularly(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # Ray may be moving the board to another node: try again later
                await self._service.exchange_counts()
            await asyncio.sleep(SHARE_SECONDS)

    async def _exchange(self, counts: ReplicaCounts) -> Mapping[str, ReplicaCounts]:
        from ray import serve

        replica = str(serve.get_replica_context().replica_id.unique_id)
        all_counts: Mapping[str, ReplicaCounts] = await self._board.exchange.remote(replica, counts)
        return all_counts


def _stderr() -> RawIOBase:
    return open(STDERR, "wb", buffering=0, closefd=False)


def _method(name: str) -> Callable[..., Awaitable[Any]]:
    async def called(self: Replica, message: Any, grpc_context: Any) -> Any:
        return await self.grpc[name](message, _GrpcContext(grpc_context))

    return called


for _name in METHODS:  # Ray Serve calls the method with the name of the gRPC method
    setattr(Replica, _name, _method(_name))


class _GrpcContext:
    """Ray's gRPC context with the method `abort`, which it lacks."""

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: Any, details: str) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        raise RsiDeployError(details)


class _Asgi:
    """An ASGI application for Ray Serve, which needs it before a replica exists; it finds the replica when called."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _replicas[0].http(scope, receive, send)


def build(args: dict[str, Any]) -> Any:
    """Return the application. `serve deploy` calls this with the `args` of its config.

    Raises:
        UsageError: a setting is invalid.
    """
    settings = read_settings(args)
    from ray import serve

    board = serve.deployment(Board).options(name="Board", num_replicas=1, ray_actor_options={"num_cpus": 0})
    replica = serve.deployment(serve.ingress(_Asgi())(Replica)).options(
        name="Replica",
        max_ongoing_requests=MAX_WAITING,  # requests wait in the replica, which knows the latency bound
        max_queued_requests=MAX_WAITING,
        autoscaling_config={
            "min_replicas": settings.replicas[0],
            "max_replicas": settings.replicas[1],
            "target_ongoing_requests": 2 * settings.max_batch,
        },
        ray_actor_options={"num_cpus": settings.threads},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return replica.bind(settings.model_dump(), board.bind())
