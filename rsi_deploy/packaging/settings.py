"""The settings of `package`."""

from typing import Any, Literal

from rsi_deploy.core.settings.base import FileName, Milliseconds, Settings, setting

FIRST: dict[str, Any] = {"first": True}


class EngineConfig(Settings, panel="Engine"):
    """Settings of the engine that runs the model."""

    target: Literal["ort", "triton", "kserve", "ray-serve"] = setting(..., "The engine.", option=FIRST)
    name: str | None = setting(None, "Name of the model in the engine. (default: the name of DIR)", option=FIRST)
    feeds: FileName | None = setting(
        None, "An .npz with one array per input, to run the model on.", option=FIRST | {"metavar": "FILE.npz"}
    )
    max_batch: int = setting(8, "Most samples that share a run.", option=FIRST, ge=1)
    max_delay_ms: Milliseconds = setting(
        1.0, "Time that a request waits for others.", option=FIRST | {"flag": "--max-delay"}, ge=0
    )
    instances: int = setting(1, "Copies of the model on each device.", ge=1)
    threads: int | None = setting(
        None, "Threads inside one operator. (default: onnxruntime's, all cores)", option=FIRST, ge=1
    )
    device: Literal["cpu", "gpu"] = setting("cpu", "Device that runs the model.", option=FIRST)
    tensorrt: Literal["off", "fp32", "fp16"] = setting("off", "Run the model with TensorRT on the GPU.")


class OrtConfig(Settings, panel="Target ort"):
    """The ORT format."""

    platform: Literal["arm", "amd64"] = setting(
        "arm", "arm runs on every CPU; amd64 also stores the layouts of x86-64."
    )


class TritonConfig(Settings, panel="Target triton"):
    """Triton's model repository."""

    backend: Literal["onnxruntime", "python"] = setting("onnxruntime", "Backend of the server.")
    dense: FileName | None = setting(None, "The dense model, for A/B tests.", option={"metavar": "FILE.onnx"})
    dense_as: Literal["version", "name"] = setting(
        "version", "Dense model as version 1 of the same model, or as NAME-dense."
    )


class ReplicasConfig(Settings, panel="Targets kserve and ray-serve"):
    """Replicas in a cluster."""

    storage_uri: str | None = setting(
        None,
        "kserve: URI of the models (s3://..., pvc://...); ray-serve: URI of the zipped package.",
        option={"metavar": "URI"},
    )
    replicas: str = setting("1-4", "The fewest and the most replicas.")
    cpus: int = setting(2, "CPUs of each replica.", ge=1)
    memory: str = setting("2Gi", "kserve: memory of each replica.")


class PackageConfig(EngineConfig, OrtConfig, TritonConfig, ReplicasConfig):
    """The settings of `package`."""
