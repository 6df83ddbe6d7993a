"""The service behind both transports: it routes requests to models, runs them on workers and counts them."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.serving.catalog import Catalog, Route, ServedModel, all_versions, reopened
from rsi_deploy.serving.engine.batches import Batcher, BatchLimits
from rsi_deploy.serving.engine.pool import Pool
from rsi_deploy.serving.engine.worker import Loaded
from rsi_deploy.serving.language.encoder import Encoder, Vectors
from rsi_deploy.serving.language.generation import PendingText, TextPiece, TextRequest
from rsi_deploy.serving.metrics import Metrics
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest, InferResponse, RunResult
from rsi_deploy.serving.protocol.signature import Outputs, Signature, metadata
from rsi_deploy.serving.shadow import Shadow

logger = logging.getLogger(__name__)

NOT_TENSORS = (
    "{} generates text: send it to /v1/completions or /v1/chat/completions; "
    "the Open Inference Protocol is not offered for decoders"
)
"""Message for requests of tensors to a decoder."""


class Service:
    """The served models and their workers.

    Args:
        routes: the models.
        limits: limits on batches and time.
        workers: number of worker processes.
        threads: threads of each worker.
        provider: onnxruntime provider.

    Attributes:
        routes: name of a model -> route.
        metrics: Prometheus metrics.
        leaving: whether the server is about to end: it reports "not ready" and closes connections after an answer.
        accepting: whether new requests are accepted.
        shadows: name of a model -> comparison with its shadow.
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
        self._limits = limits
        self._encoders: dict[str, Encoder | str] = {}

    async def start(self) -> None:
        """Load every model on every worker, and remove the models that cannot be loaded.

        Raises:
            UsageError, ModelError, GateError: no model can be loaded.
        """
        models = {served.key: served for served in all_versions(self.routes)}
        for key, error in (await self._load(list(models.values()), all_or_none=False)).items():
            self.routes.refuse(models[key].name, models[key].version, error)
        self.routes.check_not_empty()
        self.shadows = {name: Shadow(r.main, r.shadow) for name, r in self.routes.items() if r.shadow}
        for served in all_versions(self.routes):
            if (why := self._loaded[served.key].alone) and not served.is_decoder:
                logger.warning("%s %s: requests are not batched: %s", served.name, served.version, why)

    async def close(self) -> None:
        """End the workers."""
        await self._pool.close()

    @property
    def ready(self) -> bool:
        """Return whether requests are accepted and a worker can answer them."""
        return not self.leaving and bool(self._pool.active)

    def find(self, name: str, version: str) -> ServedModel:
        """Return a model by name and version; version "" stands for the main version, never for the canary.

        Raises:
            Refusal: 404, there is no such model or version.
        """
        route = self._route(name)
        return route.pick(version or route.main)

    def signature(self, served: ServedModel) -> Signature:
        """Return the inputs and outputs of a model.

        Raises:
            Refusal: 400, it generates text.
        """
        if served.is_decoder:
            raise Refusal(400, NOT_TENSORS.format(served.name))
        return self._loaded[served.key].signature

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """Return the protocol's metadata of a model.

        Raises:
            Refusal: 404, there is no such model or version; 400, it generates text.
        """
        signature = self.signature(self.find(name, version))
        return {
            "name": name,
            "versions": sorted(self.routes[name].versions, key=int),
            "platform": "onnxruntime_onnx",
            "inputs": metadata(signature.inputs),
            "outputs": metadata(signature.outputs),
        }

    def index(self) -> list[dict[str, str]]:
        """Return name, version and state of every model, as Triton's repository index has them."""
        return [
            {"name": s.name, "version": s.version, "state": "READY" if self.can_answer(s) else "UNAVAILABLE"}
            for s in all_versions(self.routes)
        ]

    def can_answer(self, served: ServedModel) -> bool:
        """Return whether a worker has the model in memory."""
        return not self.leaving and any(served.key in worker.keys for worker in self._pool.active)

    async def infer(self, name: str, version: str, request: InferRequest) -> InferResponse:
        """Return the answer to one request.

        Raises:
            Refusal: the request is not answered; with the reason.
        """
        served = self._route(name).pick(version)
        signature = self.signature(served)
        signature.check(request.feeds, name)
        signature.check_outputs(tuple(request.outputs), name)
        ran = await self._run(served, request, compared=not version)
        requested = tuple(request.outputs) or tuple(ran.outputs)
        return InferResponse(
            name=name,
            version=served.version,
            outputs={output: ran.outputs[output] for output in requested},
            waited=ran.waited,
            ran=ran.ran,
            rows=ran.rows,
        )

    def generator(self, name: str, version: str) -> ServedModel:
        """Return the decoder that generates the text of a request.

        Raises:
            Refusal: 404, there is no such model or version; 400, it is no decoder.
        """
        served = self._route(name).pick(version)
        if not served.is_decoder:
            raise Refusal(400, f"{name} generates no text: it is no folder of onnxruntime-genai (genai_config.json)")
        return served

    async def generate(
        self, served: ServedModel, request: TextRequest, on_end: Callable[[RunResult], None]
    ) -> AsyncGenerator[TextPiece]:
        """Yield the pieces of generated text; the generation stops when the generator is closed.

        Args:
            served: a decoder.
            request: what to generate.
            on_end: called with the times when the text is complete.

        Raises:
            Refusal: the request is not answered, or not to its end; with the reason.
        """
        self._check_accepting()
        arrived, last = time.perf_counter(), None
        pieces: asyncio.Queue[TextPiece | None] = asyncio.Queue()
        generation = PendingText(request=request, on_piece=pieces.put_nowait)

        def ended(task: asyncio.Task[RunResult]) -> None:
            pieces.put_nowait(None)
            if not task.cancelled():
                task.exception()  # retrieved, should nobody wait for it any more

        running = asyncio.create_task(self._batcher.run(served.key, {}, alone=True, generation=generation))
        running.add_done_callback(ended)
        try:
            while (piece := await pieces.get()) is not None:
                if last is None:
                    self.metrics.note_first_token(served.name, served.version, time.perf_counter() - arrived)
                last = piece
                yield piece
            on_end(await running)
        finally:
            running.cancel()
            if last is not None:
                counts = {"prompt": last.prompt_tokens, "generated": last.tokens}
                self.metrics.note_tokens(served.name, served.version, **counts)

    async def embed(self, name: str, version: str, texts: Sequence[str]) -> tuple[Vectors, int, InferResponse]:
        """Return the embeddings `(texts, width)`, the number of tokens, and the times without outputs.

        Raises:
            Refusal: the request is not answered; with the reason.
        """
        served = self._route(name).pick(version)
        encoder = await self._encoder(served)
        rows = await asyncio.to_thread(encoder.rows, texts)
        size = min(encoder.rows_at_once or self._limits.max_batch, self._limits.max_batch)
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))  # little padding
        found: dict[int, Any] = {}
        waited = ran = 0.0
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            chosen = [rows[number] for number in numbers]
            request = InferRequest(feeds=encoder.feeds(chosen), outputs={})
            result = await self._run(served, request, compared=not version)
            found |= zip(numbers, encoder.vectors(chosen, result.outputs), strict=True)
            waited, ran = waited + result.waited, ran + result.ran
        tokens = sum(len(row.ids) for row in rows)
        self.metrics.note_tokens(name, served.version, prompt=tokens)
        answer = InferResponse(
            name=name, version=served.version, outputs={}, waited=waited, ran=ran, rows=min(size, len(rows))
        )
        return np.stack([found[number] for number in range(len(rows))]), tokens, answer

    async def reload(self, changed: Mapping[str, ServedModel]) -> None:
        """Load replaced files and serve them once all models are loaded.

        Args:
            changed: key -> model whose files have been replaced.

        Raises:
            UsageError, ModelError, GateError: they cannot be served; the models before are still served.
        """
        fresh = {key: await asyncio.to_thread(reopened, served) for key, served in changed.items()}
        await self._load([fresh.get(served.key, served) for served in all_versions(self.routes)])
        for served in fresh.values():
            route = self.routes[served.name]
            route.versions[served.version] = served
            if route.shadow:  # the comparison so far was between other files
                self.shadows[route.name] = Shadow(route.main, route.shadow)

    async def shadow_summary(self, name: str) -> dict[str, Any]:
        """Return the comparison of a model with its shadow.

        Raises:
            Refusal: 404, there is no such model, or it has no shadow.
        """
        self._route(name)
        if name not in self.shadows:
            raise Refusal(404, f"model {name} has no shadow; start the server with --shadow {name}=DIR")
        return self.shadows[name].summary()

    async def metrics_text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        for name, shadow in self.shadows.items():
            self.metrics.note_shadow(name, shadow)
        self.metrics.note_state(self._batcher.waiting, len(self._pool.active), self._pool.restarts)
        return self.metrics.text()

    def worker_pids(self) -> list[int]:
        """Return the process ids of the active workers."""
        return [worker.pid for worker in self._pool.active]

    async def _load(self, models: list[ServedModel], *, all_or_none: bool = True) -> Mapping[str, RsiDeployError]:
        """Load the models on new workers; return key -> error of those that could not be loaded."""
        bundles = {served.key: served.bundle for served in models}
        loaded, refused = await self._pool.exchange(bundles, all_or_none=all_or_none)
        self._loaded |= loaded
        self._labels |= {served.key: (served.name, served.version) for served in models}
        return refused

    async def _run(self, served: ServedModel, request: InferRequest, *, compared: bool) -> RunResult:
        """Run a model on checked inputs; a shadow runs them as well if the request is `compared`."""
        self._check_accepting()
        ran = await self._batcher.run(served.key, request.feeds, alone=bool(self._loaded[served.key].alone))
        route = self.routes[served.name]
        if route.shadow and compared and served.version == route.main:
            self._shadow(route, request, ran)
        return ran

    def _check_accepting(self) -> None:
        if not self.accepting:
            raise Refusal(503, "the server is shutting down; try another one", retry_after=1)

    async def _encoder(self, served: ServedModel) -> Encoder:
        """Return the tokenizer and pooling of a model, read at the first request.

        Raises:
            Refusal: 400, it gives no embeddings; with the reason.
        """
        if served.bundle.kind != "encoder":
            raise Refusal(400, f"{served.name} gives no embeddings: it is no folder of an encoder with tokenizer.json")
        if served.key not in self._encoders:
            try:
                found = await asyncio.to_thread(Encoder.of_folder, served.bundle.path, self.signature(served))
            except RsiDeployError as error:
                self._encoders[served.key] = f"{served.name} gives no embeddings: {error}"
            else:
                self._encoders[served.key] = found
        encoder = self._encoders[served.key]
        if isinstance(encoder, str):
            raise Refusal(400, encoder)
        return encoder

    def _route(self, name: str) -> Route:
        if name not in self.routes:
            raise Refusal(404, f"no model {name[:80]!r} is served; expected one of {', '.join(self.routes)}")
        return self.routes[name]

    def _shadow(self, route: Route, request: InferRequest, ran: RunResult) -> None:
        task = asyncio.create_task(self._run_shadow(route, request, ran.outputs, ran.ran / ran.requests))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_shadow(self, route: Route, request: InferRequest, outputs: Outputs, seconds: float) -> None:
        served, shadow = route.versions[route.shadow], self.shadows[route.name]
        loaded = self._loaded[served.key]
        try:
            loaded.signature.check(request.feeds, route.name)
            ran = await self._batcher.run(served.key, request.feeds, alone=bool(loaded.alone), background=True)
            shadow.compare(request.feeds, outputs, ran.outputs, (seconds, ran.ran / ran.requests))
        except (Refusal, RsiDeployError) as error:
            shadow.skipped += 1
            logger.info("the shadow of %s skipped a request: %s", route.name, error)

    def _note_batch(self, key: str, rows: int, requests: int, seconds: float) -> None:
        self.metrics.note_batch(*self._labels[key], rows=rows, requests=requests, seconds=seconds)

    def _changed(self) -> None:
        self._batcher.pump()
