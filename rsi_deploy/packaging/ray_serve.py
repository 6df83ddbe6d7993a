"""`--target ray-serve`: an application and its config for `serve run` and `serve deploy`.

    DIR/app.py                 the Open Inference Protocol v2 in front of onnxruntime; needs no rsi-deploy
    DIR/model/model.onnx
    DIR/config.yaml            number of replicas, batches, address
    DIR/README.md

app.py implements the protocol itself, because libraries for it include a server, and Ray Serve is one already.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging import shipped
from rsi_deploy.packaging.result import copy_model, tensor_lines
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.packaging.yaml_text import yaml_text

TYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float", "double")


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """Storage, resources and batches of the application.

    Attributes:
        storage_uri: URI of the zipped package, for `serve deploy` on a cluster; None for one machine.
        replicas: fewest and most replicas.
        cpus: CPUs of each replica.
        threads: threads inside one operator.
        max_batch: most requests that share a run.
        max_delay_ms: milliseconds that a request may wait for others.
    """

    storage_uri: str | None
    replicas: tuple[int, int]
    cpus: int
    threads: int
    max_batch: int
    max_delay_ms: float


def deployment(name: str, model: Servable, settings: RaySettings) -> dict[str, Any]:
    """Return the config as a mapping."""
    batch = 1 if model.unbatchable else settings.max_batch
    application: dict[str, Any] = {
        "name": name,
        "route_prefix": "/",
        "import_path": "app:build",
        "args": {
            "name": name,
            "max_batch": str(batch),
            "max_delay_ms": f"{settings.max_delay_ms:g}",
            "threads": str(settings.threads),
        },
        "deployments": [
            {
                "name": "Model",
                "max_ongoing_requests": 4 * batch,
                "autoscaling_config": {
                    "min_replicas": settings.replicas[0],
                    "max_replicas": settings.replicas[1],
                    "target_ongoing_requests": 2 * batch,
                },
                "ray_actor_options": {"num_cpus": settings.cpus},
            }
        ],
    }
    if settings.storage_uri is not None:
        application["runtime_env"] = {"working_dir": settings.storage_uri}
    return {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}


def write_ray_serve(folder: Path, name: str, model: Servable, settings: RaySettings) -> None:
    """Write application, model, config and README into `folder`.

    Raises:
        ModelError: app.py does not support the type of a tensor.
    """
    for what, tensors in (("input", model.inputs), ("output", model.outputs)):
        for tensor in tensors:
            if tensor.type not in TYPES:
                raise ModelError(
                    f"{what} {tensor.name} is {tensor.type}, which --target ray-serve does not support; it supports "
                    f"tensors of {', '.join(TYPES)}: choose another --target, or export the model without it"
                )
    shutil.copyfile(Path(shipped.__path__[0]) / "ray_app.py", folder / "app.py")
    copy_model(model.model, folder / "model")
    (folder / "config.yaml").write_text(yaml_text(deployment(name, model, settings)), encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(_readme(name, model, settings), encoding="utf-8")


def _readme(name: str, model: Servable, settings: RaySettings) -> str:
    if settings.storage_uri is None:
        cluster = (
            "For a cluster, package with `--storage-uri URI.zip`, copy this folder there as a zip file, and type "
            "`serve deploy config.yaml`."
        )
    else:
        cluster = (
            f"On a cluster: `zip -r package.zip .` in this folder, copy the file to `{settings.storage_uri}`, and type "
            "`serve deploy config.yaml`."
        )
    return "\n".join(
        [
            f"# {model.facts.source.model}, compressed, for Ray Serve",
            "",
            "On one machine, in this folder:",
            "",
            "```sh",
            'pip install "ray[serve]" numpy onnxruntime',
            "export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60    # for slow or busy machines; the default is 5",
            "serve run config.yaml",
            f"curl -s localhost:8000/v2/models/{name}",
            "```",
            "",
            cluster,
            "It listens on this machine only. config.yaml has the address (`http_options`), replicas and batches.",
            "",
            *tensor_lines(model),
            "",
            f"Requests are not batched: {model.unbatchable}."
            if model.unbatchable
            else f"Up to {settings.max_batch} requests share a run and wait at most {settings.max_delay_ms:g} ms.",
            "",
        ]
    )
