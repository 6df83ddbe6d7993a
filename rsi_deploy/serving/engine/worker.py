"""A worker process: it loads models, then runs batches until the other end of its socket is closed.

    first frame in    LoadRequest              out   key -> Loaded or NotLoaded
    then              (key, [feeds, ...])      out   ([outputs or an error message, ...], seconds)
    or                (key, TextRequest) out   a TextPiece for each token
                      whether to go on               ... and at last ([TextPiece or an error message], seconds)

If a batch fails, its requests are run one by one, so that only the faulty ones fail.
"""

import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.serving.bundles import Bundle
from rsi_deploy.serving.engine.frames import receive_frame, send_frame
from rsi_deploy.serving.engine.model import LoadedModel
from rsi_deploy.serving.language.decoder import Decoder
from rsi_deploy.serving.language.generation import TextPiece, TextRequest
from rsi_deploy.serving.protocol.signature import Feeds, Outputs, Signature

COMMAND = (
    "import sys; sys.path.append(sys.argv[2]); "
    "from rsi_deploy.serving.engine.worker import main; main(int(sys.argv[1]))"
)
"""Program of a worker's interpreter. With `-m` this module would be `__main__`, and unpickling would not find it."""


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """The models that a worker loads.

    Attributes:
        bundles: key -> bundle.
        provider: onnxruntime provider.
        threads: threads inside one operator.
        try_batches: keys of the models for which this worker tests if requests can be joined.
    """

    bundles: Mapping[str, Bundle]
    provider: str
    threads: int
    try_batches: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that a worker has loaded; `alone` is the reason why its requests cannot be joined, or ""."""

    signature: Signature
    alone: str


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """The error of a model that a worker could not load."""

    message: str
    exit_code: int


def main(descriptor: int) -> None:
    """Serve one socket until its other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole process group; the front process ends us
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    try:
        models = _load(sock)
        while True:
            key, requests = receive_frame(sock)
            start = time.perf_counter()
            model = models[key]
            answers = [_generate(sock, model, requests)] if isinstance(model, Decoder) else answer(model, requests)
            send_frame(sock, (answers, time.perf_counter() - start))
    except (EOFError, OSError):
        return


def answer(model: LoadedModel, requests: Sequence[Feeds]) -> list[Outputs | str]:
    """Return the outputs of each request, or its error message."""
    try:
        return list(model.infer_batch(requests))
    except RsiDeployError as error:
        if len(requests) == 1:
            return [str(error)]
    return [answer(model, [feeds])[0] for feeds in requests]


def _generate(sock: socket.socket, model: Decoder, request: TextRequest) -> TextPiece | str:
    """Send all pieces but the last one, which is returned, or the error message."""
    try:
        pieces = model.generate(request)
        piece = next(pieces)
        while not piece.finish:
            send_frame(sock, piece)
            following = next(pieces)  # while the front process passes the piece on
            if not receive_frame(sock):
                return piece
            piece = following
        return piece
    except RsiDeployError as error:
        return str(error)


def _load(sock: socket.socket) -> dict[str, LoadedModel | Decoder]:
    request: LoadRequest = receive_frame(sock)
    models: dict[str, LoadedModel | Decoder] = {}
    results: dict[str, Loaded | NotLoaded] = {}
    for key, bundle in request.bundles.items():
        try:
            model = models[key] = _model(bundle, request, try_batches=key in request.try_batches)
            results[key] = Loaded(signature=model.signature, alone=model.alone)
        except RsiDeployError as error:
            results[key] = NotLoaded(message=str(error), exit_code=error.exit_code)
    send_frame(sock, results)
    return models


def _model(bundle: Bundle, request: LoadRequest, *, try_batches: bool) -> LoadedModel | Decoder:
    if bundle.kind == "decoder":
        return Decoder(bundle, request.provider, threads=request.threads)
    return LoadedModel(bundle, request.provider, threads=request.threads, try_batches=try_batches)
