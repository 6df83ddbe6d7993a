"""The service as a Ray Serve application: each replica is the whole server but for its listening sockets.

    client --HTTP, gRPC--> Ray Serve's proxy --> a replica: the protocol, routes, batches --> its worker process
                                                 Board: what all replicas count

Ray brings the sockets, the replicas, their number under load, and another one where one dies. The protocol, the canary,
the shadow, the batches and their bound are those of `rsi-deploy serve`, by the same code. `build` is what the config
for `serve deploy` names; its `args` are `RayAppSettings`.

What a replica had when it died is answered by Ray's proxy with 500, not tried again: nobody knows if it was the cause.
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
from rsi_deploy.serving.catalog import Catalog, read_catalog
from rsi_deploy.serving.engine.batches import MOST_WAITING, BatchLimits
from rsi_deploy.serving.merging import Board, ReplicaCounts, joined_metrics
from rsi_deploy.serving.ray.grpc import METHODS
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.shadow import Shadow
from rsi_deploy.serving.transports.common import Access
from rsi_deploy.serving.transports.grpc_app import grpc_calls
from rsi_deploy.serving.transports.http_app import http_app
from rsi_deploy.serving.watching import watch

TELL_SECONDS = 1.0
STDERR = 2  # the descriptor: Ray may have put something else in the place of sys.stderr

Positive = Annotated[float, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=1)]


class RayAppSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What the application is to be: the `args` in a config.

    Attributes:
        models: `[NAME[:VERSION]=]PATH` each; every node that has a replica must have the files there.
        canary, canary_share, shadow: as for `rsi_deploy.serve`.
        replicas: fewest and most.
        threads: of each replica, and the CPUs that it takes of its node.
        max_batch, batch_delay, latency_bound: of batches, in rows and seconds.
        max_body, max_json: bytes of a request, and of the JSON in it.
        access_log: "-" is the replica's stderr, which Ray keeps with its logs.
        reload_seconds: between looks at the files, which each replica does for itself; 0 never looks.
        drain_seconds: that a replica has to answer what it took, when it is to end.
        api_key: that clients must send; never written into a config.
        needs_key: whether there must be one: a config's comes from the replica's environment, $RSI_DEPLOY_API_KEY.
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
        """Of batches and time."""
        return BatchLimits(max_batch=self.max_batch, batch_delay=self.batch_delay, latency_bound=self.latency_bound)

    @property
    def longest(self) -> float:
        """Seconds after which a request that is still not answered never will be: two whole tries."""
        return 2 * (self.latency_bound + self.limits.run_timeout)

    def catalog(self) -> Catalog:
        """The models, every bundle checked.

        Raises:
            UsageError, ModelError, GateError: as `read_catalog`.
        """
        return read_catalog(self.models, canary=self.canary, canary_share=self.canary_share, shadow=self.shadow)


def read_settings(args: Mapping[str, Any]) -> RayAppSettings:
    """The settings that a config or a caller gives.

    Raises:
        UsageError: which of them is none.
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
    """The models of one replica, which tells what all replicas count.

    Args:
        settings: of the application.
        exchange: puts its own on the board and gives everybody's.
    """

    def __init__(
        self, settings: RayAppSettings, exchange: Callable[[ReplicaCounts], Awaitable[Mapping[str, ReplicaCounts]]]
    ):
        super().__init__(settings.catalog(), settings.limits, workers=1, threads=settings.threads, provider="cpu")
        self._exchange = exchange

    async def tell(self) -> Mapping[str, ReplicaCounts]:
        """Put on the board what was counted here; what all replicas have counted."""
        shadows = {name: Shadow.joined([shadow]) for name, shadow in self.shadows.items()}  # a copy, to travel
        return await self._exchange(ReplicaCounts(metrics=await super().measured(), shadows=shadows))

    async def compared(self, name: str) -> dict[str, Any]:
        """As `Service.compared`, of all replicas."""
        await super().compared(name)
        everybody = (await self.tell()).values()
        return Shadow.joined([counted.shadows[name] for counted in everybody if name in counted.shadows]).told()

    async def measured(self) -> bytes:
        """As `Service.measured`, of all replicas, apart by the label `replica`."""
        return joined_metrics({name: counted.metrics for name, counted in (await self.tell()).items()})


_here: "list[Replica]" = []
"""The replica of this process: Ray Serve has one in each, and hands its ASGI application no way to it."""


class Replica:
    """What Ray starts as often as the load wants it.

    Args:
        args: `RayAppSettings` as an object.
        board: Ray's handle of the one `Board`.

    Raises:
        RsiDeployError: a bundle that is not what it claims, or an API key that is missing.
    """

    def __init__(self, args: Mapping[str, Any], board: Any):
        settings = read_settings(args)
        key = settings.api_key or (os.environ.get(KEY_VARIABLE, "") if settings.needs_key else "")
        if settings.needs_key and not key:
            raise UsageError(
                f"an API key is wanted, but ${KEY_VARIABLE} is not set where the replicas run; set it there"
            )
        self._settings, self._board = settings, board
        self._service = ReplicaService(settings, self._exchange)
        stderr = None if settings.access_log == "off" else _stderr()
        self._log = AccessLog(stderr)
        access = Access(api_key=key, max_body=settings.max_body, max_json=settings.max_json)
        self.http = http_app(self._service, access, self._log, self._lifespan)
        self.grpc = grpc_calls(self._service, access, self._log)
        _here[:] = [self]

    async def check_health(self) -> None:
        """Ray asks now and then, and replaces the replica that fails several times.

        Raises:
            RsiDeployError: no worker process lives.
        """
        if not self._service.ready:
            raise RsiDeployError("the worker process has died and has not come back yet; it is started again")

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """From before the first request to after the last one."""
        await self._service.start()
        tasks = [asyncio.create_task(self._tell())]
        if self._settings.reload_seconds:
            tasks.append(asyncio.create_task(watch(self._service, self._settings.reload_seconds)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await self._service.close()
            self._log.close()

    async def _tell(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # the board may be on its way to another node: it is told next time
                await self._service.tell()
            await asyncio.sleep(TELL_SECONDS)

    async def _exchange(self, counted: ReplicaCounts) -> Mapping[str, ReplicaCounts]:
        from ray import serve

        found: Mapping[str, ReplicaCounts] = await self._board.exchange.remote(
            str(serve.get_replica_context().replica_id.unique_id), counted
        )
        return found


def _stderr() -> RawIOBase:
    return open(STDERR, "wb", buffering=0, closefd=False)


def _method(name: str) -> Callable[..., Awaitable[Any]]:
    async def called(self: Replica, message: Any, grpc_context: Any) -> Any:
        return await self.grpc[name](message, _GrpcContext(grpc_context))

    return called


for _name in METHODS:  # Ray Serve calls the method that has the name of gRPC's
    setattr(Replica, _name, _method(_name))


class _GrpcContext:
    """Ray's context, with the one method that it has not."""

    def __init__(self, context: Any):
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def abort(self, code: Any, details: str) -> None:
        self._context.set_code(code)
        self._context.set_details(details)
        raise RsiDeployError(details)


class _Asgi:
    """Ray Serve takes its ASGI application before there is a replica; this one finds it when it is called."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _here[0].http(scope, receive, send)


def build(args: dict[str, Any]) -> Any:
    """The application: what `serve deploy` calls with the `args` of its config.

    Raises:
        UsageError: arguments that are none.
    """
    settings = read_settings(args)
    from ray import serve

    board = serve.deployment(Board).options(name="Board", num_replicas=1, ray_actor_options={"num_cpus": 0})
    replica = serve.deployment(serve.ingress(_Asgi())(Replica)).options(
        name="Replica",
        max_ongoing_requests=MOST_WAITING,  # what waits, waits where the latency bound is known
        max_queued_requests=MOST_WAITING,
        autoscaling_config={
            "min_replicas": settings.replicas[0],
            "max_replicas": settings.replicas[1],
            "target_ongoing_requests": 2 * settings.max_batch,
        },
        ray_actor_options={"num_cpus": settings.threads},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return replica.bind(settings.model_dump(), board.bind())
