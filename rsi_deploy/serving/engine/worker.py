"""A worker process: loads the models it is told to, then answers batches until the other end of its socket is gone.

    first frame in    LoadOrder                            out   key -> Loaded, or the reason why it is not
    then              (key, [feeds, ...])                  out   ([outputs or the words of a failure, ...], seconds)

A batch that fails as a whole is run request by request, so that only those that are to blame fail.
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
from rsi_deploy.serving.protocol.signature import Feeds, Outputs, Signature

COMMAND = (
    "import sys; sys.path.append(sys.argv[2]); "
    "from rsi_deploy.serving.engine.worker import main; main(int(sys.argv[1]))"
)
"""What a worker's interpreter runs; as `-m` this module would be another one, whose objects nobody else knows."""


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """What a worker is to load: key -> bundle, and how; and for which of them it tries if requests can be joined."""

    bundles: Mapping[str, Bundle]
    provider: str
    threads: int
    try_batches: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What a worker says of a model it has loaded; `alone` is why requests cannot be joined, as far as it knows."""

    signature: Signature
    alone: str


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """Why a model was not loaded, and the exit code of that error."""

    message: str
    exit_code: int


def main(descriptor: int) -> None:
    """Serve one socket until its other end is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # of the terminal's group: the front process drains us
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=descriptor)
    try:
        models = _load(sock)
        while True:
            key, requests = receive_frame(sock)
            start = time.perf_counter()
            answers = answer(models[key], requests)
            send_frame(sock, (answers, time.perf_counter() - start))
    except (EOFError, OSError):
        return


def answer(model: LoadedModel, requests: Sequence[Feeds]) -> list[Outputs | str]:
    """The outputs of each request, or the words of its failure."""
    try:
        return list(model.infer_together(requests))
    except RsiDeployError as error:
        if len(requests) == 1:
            return [str(error)]
    return [answer(model, [feeds])[0] for feeds in requests]


def _load(sock: socket.socket) -> dict[str, LoadedModel]:
    order: LoadOrder = receive_frame(sock)
    models: dict[str, LoadedModel] = {}
    said: dict[str, Loaded | NotLoaded] = {}
    for key, bundle in order.bundles.items():
        try:
            tried = key in order.try_batches
            model = LoadedModel(bundle, order.provider, threads=order.threads, try_batches=tried)
            models[key] = model
            said[key] = Loaded(signature=model.signature, alone=model.alone)
        except RsiDeployError as error:
            said[key] = NotLoaded(message=str(error), exit_code=error.exit_code)
    send_frame(sock, said)
    return models
