"""`rsi-deploy serve`: bundles behind the Open Inference Protocol."""

import dataclasses
import json
import logging
import os
from typing import IO, TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.units import parse_seconds, parse_share, parse_size
from rsi_deploy.serving import KEY_VARIABLE

if TYPE_CHECKING:
    from rsi_deploy.serving.front import Listening


@click.command()
@click.argument("models", metavar="[NAME[:VERSION]=]PATH...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--http-port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--grpc-port", default=8001, show_default=True, type=click.IntRange(0, 65535), help="Likewise.")
@click.option("--no-grpc", is_flag=True, help="HTTP alone.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that run models. [default: 2; 1 on one core]")
@click.option("--threads", type=click.IntRange(min=1), help="Of each worker. [default: the cores, shared out]")
@click.option("--provider", default="cpu", show_default=True, help="onnxruntime provider: cpu, cuda, ...")
@click.option(
    "--max-batch", default=16, show_default=True, type=click.IntRange(min=1), help="Rows that are joined; 1: none."
)
@click.option("--batch-delay", default="2ms", show_default=True, help="A request waits so long for others, at most.")
@click.option(
    "--latency-bound", default="2s", show_default=True, help="What would take longer is refused: 429, try again later."
)
@click.option("--canary", default="", metavar="[NAME=]PATH", help="A model that answers a share of the requests.")
@click.option("--canary-share", default="", metavar="10%", help="That share.")
@click.option("--shadow", default="", metavar="[NAME=]PATH", help="A model that runs beside and is compared.")
@click.option(
    "--api-key-file", type=click.File(), help=f"A file with the key that clients must send; or set ${KEY_VARIABLE}."
)
@click.option("--max-body", default="64MB", show_default=True, help="Of a request.")
@click.option("--max-json", default="8MB", show_default=True, help="Of JSON in a request.")
@click.option("--access-log", default="-", show_default=True, metavar="FILE|-|off", help="JSON lines; -: stderr.")
@click.option("--reload-every", default="1s", show_default=True, metavar="TIME|off", help="Look for replaced bundles.")
@click.option("--drain", default="30s", show_default=True, help="Time for answers that are due when the server ends.")
@click.option(
    "--engine",
    type=click.Choice(["own", "ray"]),
    default="own",
    show_default=True,
    help="ray: as a Ray Serve application, whose replicas grow with the load. [extra: ray]",
)
@click.option("--ray", default="", metavar="ADDRESS|local", help="Engine ray: a cluster. [default: local, a Ray here]")
@click.option("--replicas", default="", metavar="1-4", help="Engine ray: the fewest and the most. [default: 1-4]")
@click.option(
    "--write-config",
    default="",
    metavar="FILE",
    help="Engine ray: write the config for `serve deploy` instead of serving.",
)
@click.option("--json", "as_json", is_flag=True, help="Where it listens as one JSON document on stdout.")
def serve(
    models: tuple[str, ...],
    host: str,
    http_port: int,
    grpc_port: int,
    no_grpc: bool,
    workers: int | None,
    threads: int | None,
    provider: str,
    max_batch: int,
    batch_delay: str,
    latency_bound: str,
    canary: str,
    canary_share: str,
    shadow: str,
    api_key_file: IO[str] | None,
    max_body: str,
    max_json: str,
    access_log: str,
    reload_every: str,
    drain: str,
    engine: Literal["own", "ray"],
    ray: str,
    replicas: str,
    write_config: str,
    as_json: bool,
) -> None:
    """Serve bundles (or .onnx files) over HTTP and gRPC until interrupted: Open Inference Protocol v2.

    PATH is a bundle, an .onnx file, or a folder of numbered bundles, which are versions of one model. A bundle whose
    files are not what it claims is not served. Needs the extra: pip install 'rsi-deploy[serve,cpu]'.

    With --engine ray (pip install 'rsi-deploy[serve,ray,cpu]') each replica is such a server with one worker process
    and takes --threads CPUs of its node, 1 by default. Ray Serve listens for gRPC on every address, so there is none
    without --host 0.0.0.0. --workers, --provider and an --access-log FILE are not for it.
    """
    from rsi_deploy.serving.server import EVERY_ADDRESS, RAY_GRPC
    from rsi_deploy.serving.server import serve as run_serve

    logging.getLogger("rsi_deploy.serving").setLevel(logging.WARNING)  # reloads, and models that are not batched
    key = api_key_file.read().strip() if api_key_file is not None else os.environ.get(KEY_VARIABLE, "")
    if api_key_file is not None and not key:
        raise UsageError("--api-key-file: the file is empty; write the key into it")
    grpc = not no_grpc
    typed = click.get_current_context().get_parameter_source("grpc_port") is not ParameterSource.DEFAULT
    if engine == "ray" and grpc and not typed and host not in EVERY_ADDRESS:
        logging.getLogger(__name__).error("HTTP alone: %s; --host 0.0.0.0 with an API key has both", RAY_GRPC)
        grpc = False
    if host not in ("127.0.0.1", "localhost", "::1") and not key:
        logging.getLogger(__name__).error("anyone who reaches %s may use the models: no API key is set", host)
    run_serve(
        models,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        grpc=grpc,
        workers=workers or 0,
        threads=threads or 0,
        provider=provider,
        max_batch=max_batch,
        batch_delay=0.0 if batch_delay == "0" else parse_seconds(batch_delay, "--batch-delay"),
        latency_bound=parse_seconds(latency_bound, "--latency-bound"),
        canary=canary,
        canary_share=parse_share(canary_share, "--canary-share") if canary_share else 0.0,
        shadow=shadow,
        api_key=key,
        max_body=parse_size(max_body, "--max-body"),
        max_json=parse_size(max_json, "--max-json"),
        access_log=access_log,
        reload_seconds=0.0 if reload_every == "off" else parse_seconds(reload_every, "--reload-every"),
        drain_seconds=parse_seconds(drain, "--drain"),
        engine=engine,
        ray=ray,
        replicas=replicas,
        write_config=write_config,
        on_ready=lambda listening: _tell(listening, as_json),
    )
    if write_config:
        click.echo(json.dumps({"config": write_config}) if as_json else f"serve deploy {write_config}")


def _tell(listening: "Listening", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(listening)))
        return
    for name, versions in listening.models.items():
        click.echo(f"{name}, version {', '.join(versions)}: http://{listening.http}/v2/models/{name}/infer")
    if listening.grpc:
        click.echo(f"gRPC: {listening.grpc}")
