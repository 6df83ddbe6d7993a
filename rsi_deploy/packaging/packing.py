"""The verb `package`: it makes a folder for a serving engine from a bundle.

bundle --read_servable--> Servable --> ort | triton | kserve | ray-serve --> manifest.json
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.bundle import atomic_folder, check_target
from rsi_deploy.io.folders.config import GENAI
from rsi_deploy.io.manifest import MANIFEST, write_manifest
from rsi_deploy.packaging.kserve import KserveSettings, check_label, write_kserve
from rsi_deploy.packaging.ort_format import Platform, write_ort
from rsi_deploy.packaging.ray_serve import RaySettings, write_ray_serve
from rsi_deploy.packaging.replicas import parse_replicas
from rsi_deploy.packaging.result import PackageResult, Target
from rsi_deploy.packaging.servable import Servable, read_dense, read_servable
from rsi_deploy.packaging.triton import DenseAs, entries, write_triton
from rsi_deploy.packaging.triton_config import Backend, Precision, TritonSettings

ENGINE = {"max_batch", "max_delay_ms", "instances", "threads", "device", "tensorrt"}
USES: dict[str, set[str]] = {
    "ort": {"platform"},
    "triton": {*ENGINE, "backend", "dense", "dense_as"},
    "kserve": {*ENGINE, "storage_uri", "replicas", "cpus", "memory"},
    "ray-serve": {"max_batch", "max_delay_ms", "threads", "storage_uri", "replicas", "cpus"},
}
"""Target -> its options; others are refused."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def package(
    folder: str | Path,
    output: str | Path,
    *,
    target: Target,
    name: str | None = None,
    feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None,
    platform: Platform = "arm",
    backend: Backend = "onnxruntime",
    dense: str | Path | None = None,
    dense_as: DenseAs = "version",
    max_batch: int = 8,
    max_delay_ms: float = 1.0,
    instances: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    tensorrt: Precision = "off",
    storage_uri: str | None = None,
    replicas: str = "1-4",
    cpus: int = 2,
    memory: str = "2Gi",
    force: bool = False,
) -> PackageResult:
    """Make a package for a serving engine from the bundle in `folder`.

    Args:
        folder: a bundle whose files match its manifest.
        output: folder of the package.
        target: "ort", "triton", "kserve" or "ray-serve".
        name: name of the model in the engine; None is the name of the bundle's folder.
        feeds: inputs to run the model on: an `.npz` or input name -> array; None makes the probe inputs of the report.
        platform: ort: "arm" runs on every CPU; "amd64" also stores layouts for x86-64.
        backend: triton: "onnxruntime", or "python" for servers without the onnxruntime backend.
        dense: triton: a dense ONNX model to serve as well, or None.
        dense_as: triton: "version" (1 dense, 2 compressed) or "name" (NAME-dense).
        max_batch: most samples that share a run.
        max_delay_ms: milliseconds that a request may wait for others.
        instances: copies of the model on each device.
        threads: threads inside one operator; None is onnxruntime's default, or the CPUs of a replica for ray-serve.
        device: "cpu" or "gpu".
        tensorrt: "fp32" or "fp16" runs the model with TensorRT on the GPU; "off" does not.
        storage_uri: kserve: URI of the model repository; ray-serve: URI of the zipped package, for a cluster.
        replicas: fewest and most replicas, such as "1-4".
        cpus: CPUs of each replica.
        memory: kserve: memory of each replica, such as "2Gi".
        force: whether to replace a folder that rsi-deploy wrote.

    Raises:
        UsageError: an option is invalid, or the target does not have it.
        ModelError: the model cannot be run, or the engine does not support it.
        GateError: the bundle does not match its manifest, or the outputs of the package differ from the bundle's.
    """
    _check_options(target, {key for key, value in locals().items() if key in DEFAULTS and value != DEFAULTS[key]})
    if target != "ort" and (Path(folder) / GENAI).is_file():
        raise UsageError(
            f"{folder} is a decoder of onnxruntime-genai, for which --target {target} is not offered",
            hint="type rsi-deploy serve FOLDER, which answers /v1/completions and /v1/chat/completions",
        )
    name = _name(name, Path(folder), target)
    check_target(Path(output), force=force, inputs=(folder, dense, feeds))
    triton = TritonSettings(
        backend=backend,
        max_batch=max_batch,
        max_delay_ms=max_delay_ms,
        instances=instances,
        threads=threads,
        device="gpu" if device == "gpu" else "cpu",
        tensorrt=tensorrt,
    )
    _check_triton(triton, device)
    kserve = _kserve(storage_uri, replicas, cpus, memory) if target == "kserve" else None
    ray = _ray(storage_uri, replicas, cpus, triton) if target == "ray-serve" else None
    model = read_servable(folder, feeds)
    dense_model = None if dense is None else read_dense(Path(dense), model)
    repository = entries(name, model, dense_model, dense_as)
    with atomic_folder(Path(output), force=force) as work:
        if target == "ort":
            write_ort(work, model, platform)
        elif kserve is not None:
            write_kserve(work, repository[0], kserve, triton)
        elif ray is not None:
            write_ray_serve(work, name, model, ray)
        else:
            write_triton(work, repository, triton)
        files = (*write_manifest(work).files, MANIFEST)
    return PackageResult(
        target=target,
        name=name,
        folder=str(output),
        files=tuple(sorted(files)),
        batched=None if target == "ort" else not repository[0].versions[-1].unbatchable,
        notes=(*model.notes, *_notes(target, repository[0].versions[-1], dense)),
    )


DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(package).parameters.items()
    if any(name in options for options in USES.values())
}
"""Options that depend on the target -> their defaults."""


def _check_options(target: str, changed: set[str]) -> None:
    if target not in USES:
        raise UsageError(f"--target must be {', '.join(USES)}, but got {target!r}")
    for key in sorted(changed):
        if key not in USES[target]:
            others = " and ".join(f"--target {other}" for other, known in USES.items() if key in known)
            raise UsageError(f"{flag(key)} has no effect with --target {target}; it belongs to {others}")


def flag(key: str) -> str:
    """Return the option of a parameter on the command line.

    Example:
        >>> flag("max_delay_ms")
        '--max-delay'
    """
    return "--" + key.removesuffix("_ms").replace("_", "-")


def _name(name: str | None, folder: Path, target: str) -> str:
    made = folder.resolve().name if name is None else name
    if target == "kserve":
        check_label(made)
    if not NAME.fullmatch(made):
        raise UsageError(f"a model's name has letters, digits, . _ and -, but got {made!r}; choose one with --name")
    return made


def _check_triton(settings: TritonSettings, device: str) -> None:
    for key, value, known in (
        ("backend", settings.backend, get_args(Backend)),
        ("device", device, ("cpu", "gpu")),
        ("tensorrt", settings.tensorrt, get_args(Precision)),
    ):
        if value not in known:
            raise UsageError(f"--{key} must be {', '.join(known)}, but got {value!r}")
    for key in ("max_batch", "instances", "threads"):
        number = getattr(settings, key)
        if number is not None and number < 1:
            raise UsageError(f"{flag(key)} must be 1 or more, but got {number}")
    if settings.max_delay_ms < 0:
        raise UsageError(f"--max-delay must be 0 or more milliseconds, but got {settings.max_delay_ms}")
    if settings.tensorrt != "off" and (device != "gpu" or settings.backend != "onnxruntime"):
        raise UsageError("--tensorrt needs --device gpu and --backend onnxruntime")


def _kserve(storage_uri: str | None, replicas: str, cpus: int, memory: str) -> KserveSettings:
    if storage_uri is None:
        raise UsageError("--target kserve needs --storage-uri, such as s3://bucket/models or pvc://name/models")
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|M|G)", memory):
        raise UsageError(f"--memory must be a number and Mi or Gi, such as 2Gi, but got {memory!r}")
    _check_cluster(storage_uri, cpus)
    return KserveSettings(storage_uri=storage_uri, replicas=parse_replicas(replicas), cpus=cpus, memory=memory)


def _ray(storage_uri: str | None, replicas: str, cpus: int, engine: TritonSettings) -> RaySettings:
    _check_cluster(storage_uri, cpus)
    return RaySettings(
        storage_uri=storage_uri,
        replicas=parse_replicas(replicas),
        cpus=cpus,
        threads=engine.threads or cpus,  # onnxruntime's default would be every core of the node
        max_batch=engine.max_batch,
        max_delay_ms=engine.max_delay_ms,
    )


def _check_cluster(storage_uri: str | None, cpus: int) -> None:
    if storage_uri is not None and not re.match(r"[a-z][a-z0-9+.-]*://\S+$", storage_uri):
        raise UsageError(f"--storage-uri must be a URI, such as s3://bucket/models, but got {storage_uri!r}")
    if cpus < 1:
        raise UsageError(f"--cpus must be 1 or more, but got {cpus}")


def _notes(target: str, model: Servable, dense: str | Path | None) -> list[str]:
    notes = []
    if target != "ort" and model.unbatchable:
        notes.append(f"requests are not batched: {model.unbatchable}")
    if target == "triton" and dense is None and (kept := model.model.with_name("dense.onnx")).is_file():
        notes.append(f"the dense model is left out; add it for A/B tests with --dense {kept}")
    return notes
