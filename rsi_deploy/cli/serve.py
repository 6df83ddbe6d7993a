"""`rsi-deploy serve`: bundles behind the Open Inference Protocol and OpenAI's."""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rsi_deploy.cli.derived import Verb, option, settings_options
from rsi_deploy.core.errors import UsageError
from rsi_deploy.serving import KEY_VARIABLE
from rsi_deploy.serving.settings import ServeConfig

if TYPE_CHECKING:
    from rsi_deploy.serving.front import Listening


@click.command(cls=Verb)
@click.argument("models", metavar="[NAME[:VERSION]=]PATH...", nargs=-1, required=True)
@settings_options(ServeConfig)
@option("--json", "as_json", is_flag=True, help="Where it listens as one JSON document on stdout.")
def serve(models: tuple[str, ...], settings: ServeConfig, *, as_json: bool) -> None:
    """Serve bundles (or .onnx files) over HTTP and gRPC until interrupted: Open Inference Protocol v2.

    PATH is a bundle, an .onnx file, or a folder of numbered bundles, which are versions of one model. A bundle whose
    files are not what it claims is not served. Needs the extra: pip install 'rsi-deploy[serve,cpu]'.

    A folder of onnxruntime-genai, or a bundle of one, answers /v1/completions and /v1/chat/completions as OpenAI does
    (pip install 'rsi-deploy[serve,cpu,genai]'); one of an encoder with its tokenizer.json answers /v1/embeddings
    (pip install 'rsi-deploy[serve,cpu,text]').

    With --engine ray (pip install 'rsi-deploy[serve,ray,cpu]') each replica is such a server with one worker process
    and takes --threads CPUs of its node, 1 by default. Ray Serve listens for gRPC on every address, so there is none
    without --host 0.0.0.0. --workers, --provider and an --access-log FILE are not for it.
    """
    from rsi_deploy.serving.server import EVERY_ADDRESS, RAY_GRPC
    from rsi_deploy.serving.server import serve as run_serve

    logging.getLogger("rsi_deploy.serving").setLevel(logging.WARNING)  # reloads, and models that are not batched
    key = _api_key(settings.api_key_file)
    grpc = settings.grpc
    typed = "grpc_port" in settings.model_fields_set
    if settings.engine == "ray" and grpc and not typed and settings.host not in EVERY_ADDRESS:
        logging.getLogger(__name__).error("HTTP alone: %s; --host 0.0.0.0 with an API key has both", RAY_GRPC)
        grpc = False
    if settings.host not in ("127.0.0.1", "localhost", "::1") and not key:
        logging.getLogger(__name__).error("anyone who reaches %s may use the models: no API key is set", settings.host)
    given = settings.keywords() | {
        "grpc": grpc,
        "workers": settings.workers or 0,
        "threads": settings.threads or 0,
        "canary_share": settings.canary_share or 0.0,
        "api_key": key,
    }
    del given["api_key_file"]
    run_serve(models, **given, on_ready=lambda listening: _tell(listening, as_json))
    if settings.write_config:
        config = settings.write_config
        click.echo(json.dumps({"config": config}) if as_json else f"serve deploy {config}")


def _api_key(file: str | None) -> str:
    """Return the key that clients must send; "" for none."""
    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {file} cannot be read: {error}; name a text file with the key") from None
    if not key:
        raise UsageError("--api-key-file: the file is empty; write the key into it")
    return key


def _tell(listening: "Listening", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(listening)))
        return
    for name, versions in listening.models.items():
        path = listening.paths.get(name, f"/v2/models/{name}/infer")
        click.echo(f"{name}, version {', '.join(versions)}: http://{listening.http}{path}")
    if listening.grpc:
        click.echo(f"gRPC: {listening.grpc}")
