"""`--target ray-serve`: an application file and the config that `serve run` and `serve deploy` take.

    DIR/app.py                 the Open Inference Protocol v2 in front of onnxruntime; needs no rsi-deploy
    DIR/model/model.onnx
    DIR/config.yaml            replicas that grow with the load, batches with a bound on the wait
    DIR/README.md

The protocol's layer is a few pages and not a library's: those that have one bring a server of their own with it, which
Ray Serve is already.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging import shipped
from rsi_deploy.packaging.result import copy_model, described
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.packaging.yaml_text import yaml_text

TYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float", "double")


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """What the cluster is asked for.

    Attributes:
        storage_uri: where the zipped package will lie, for `serve deploy` on a cluster; None for one machine.
        replicas: fewest and most.
        cpus: of each replica.
        threads: inside one operator.
        max_batch: requests that share a run.
        max_delay_ms: how long a request may wait for others.
    """

    storage_uri: str | None
    replicas: tuple[int, int]
    cpus: int
    threads: int
    max_batch: int
    max_delay_ms: float


def deployment(name: str, model: Servable, settings: RaySettings) -> dict[str, Any]:
    """The config as an object."""
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
        ModelError: a tensor of a type that the protocol's layer here has not.
    """
    for what, tensors in (("input", model.inputs), ("output", model.outputs)):
        for tensor in tensors:
            if tensor.type not in TYPES:
                raise ModelError(
                    f"{what} {tensor.name} is {tensor.type}, which --target ray-serve does not take; it takes tensors "
                    f"of {', '.join(TYPES)}: choose another --target, or export the model without it"
                )
    shutil.copyfile(Path(shipped.__path__[0]) / "ray_app.py", folder / "app.py")
    copy_model(model.model, folder / "model")
    (folder / "config.yaml").write_text(yaml_text(deployment(name, model, settings)), encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(_readme(name, model, settings), encoding="utf-8")


def _readme(name: str, model: Servable, settings: RaySettings) -> str:
    if settings.storage_uri is None:
        cluster = (
            "For a cluster, package with `--storage-uri URI.zip`, where every node finds this folder, zipped; then "
            "`serve deploy config.yaml`."
        )
    else:
        cluster = (
            f"On a cluster: `zip -r package.zip .` in this folder, copy it to `{settings.storage_uri}`, then "
            "`serve deploy config.yaml`."
        )
    return "\n".join(
        [
            f"# {model.report.source.model}, compressed, for Ray Serve",
            "",
            "On one machine, in this folder:",
            "",
            "```sh",
            'pip install "ray[serve]" numpy onnxruntime',
            "export RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60    # a slow or busy machine needs it; the default is 5",
            "serve run config.yaml",
            f"curl -s localhost:8000/v2/models/{name}",
            "```",
            "",
            cluster,
            "It listens to this machine only: `http_options` in config.yaml has the address. Replicas, batches and",
            "CPUs stand there too.",
            "",
            *described(model),
            "",
            f"Requests are not put together: {model.unbatchable}."
            if model.unbatchable
            else f"Up to {settings.max_batch} requests share a run and wait at most {settings.max_delay_ms:g} ms.",
            "",
        ]
    )
