"""The text of a `config.pbtxt`: Triton's ModelConfig for one model of a repository.

    batched       max_batch_size 8, dims without the batch axis, dynamic_batching with a maximal delay
    not batched   max_batch_size 0, dims of the model; a comment has the reason

Triton has no empty dims. A sample's scalar in a batched model is `dims: [1]` with an empty reshape. A scalar of a model
without batches is `dims: [1]` alone: Triton refuses the empty reshape there, and its onnxruntime backend and
`triton_model.py` make the scalar from one number. Warm-up runs use the shapes of the probe inputs, with random floats
and with zeros for integers, because random integers may be invalid indices.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging.servable import Servable, Tensor

Backend = Literal["onnxruntime", "python"]
Precision = Literal["off", "fp32", "fp16"]

TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float": "TYPE_FP32",
    "double": "TYPE_FP64",
    "string": "TYPE_STRING",
}
"""onnxruntime's name of a type -> Triton's; both backends support all of them."""


class EnumValue(str):
    """A text that is written without quotes."""


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """The settings of a model in Triton.

    Attributes:
        backend: "onnxruntime", or "python" for servers without it.
        max_batch: most samples in a run.
        max_delay_ms: milliseconds that a request may wait for others.
        instances: copies of the model on each device.
        threads: threads inside one operator of each instance; None is onnxruntime's default, all cores.
        device: "cpu" or "gpu".
        tensorrt: precision of the TensorRT acceleration, or "off".
    """

    backend: Backend
    max_batch: int
    max_delay_ms: float
    instances: int
    threads: int | None
    device: Literal["cpu", "gpu"]
    tensorrt: Precision


def config_text(name: str, model: Servable, settings: TritonSettings, *, versions: int) -> str:
    """Return the config of one model directory.

    Args:
        name: name of the model and of its directory.
        model: the model.
        settings: settings of Triton.
        versions: number of version directories; all of them are served.

    Raises:
        ModelError: Triton does not support the type or shape of a tensor.
    """
    batched = not model.unbatchable
    fields: dict[str, Any] = {
        "name": name,
        "backend": settings.backend,
        "max_batch_size": settings.max_batch if batched else 0,
        "input": [_tensor("input", tensor, batched, settings.backend) for tensor in model.inputs],
        "output": [_tensor("output", tensor, batched, settings.backend) for tensor in model.outputs],
    }
    if versions > 1:
        fields["version_policy"] = {"all": {}}
    if batched:
        fields["dynamic_batching"] = {"max_queue_delay_microseconds": round(1000 * settings.max_delay_ms)}
    fields["instance_group"] = [{"count": settings.instances, "kind": EnumValue(f"KIND_{settings.device.upper()}")}]
    if settings.tensorrt != "off":
        fields["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [_tensorrt(settings)]}}
    if settings.threads is not None:
        fields["parameters"] = [_parameter("intra_op_thread_count", {"string_value": str(settings.threads)})]
    fields["model_warmup"] = _warm_ups(model, settings)
    comment = f"# Not batched: {' '.join(model.unbatchable.split())}\n" if model.unbatchable else ""
    return comment + proto_text(fields)


def proto_text(fields: Mapping[str, Any], depth: int = 0) -> str:
    """Return fields in protobuf's text format; lists are repeated fields and mappings are messages.

    Example:
        >>> print(proto_text({"name": "m", "dims": [-1, 3], "kind": EnumValue("CPU"), "policy": {"all": {}}}), end="")
        name: "m"
        dims: [-1, 3]
        kind: CPU
        policy {
          all {
          }
        }
    """
    lines = []
    for key, value in fields.items():
        messages = [value] if isinstance(value, Mapping) else value
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            for message in messages:
                lines.append(f"{key} {{\n{proto_text(message, depth + 1)}{'  ' * depth}}}")
        elif isinstance(value, list):
            lines.append(f"{key}: [{', '.join(map(_scalar, value))}]")
        else:
            lines.append(f"{key}: {_scalar(value)}")
    return "".join(f"{'  ' * depth}{line}\n" for line in lines)


def _scalar(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | EnumValue):
        return str(value)
    text = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + re.sub("[\x00-\x1f\x7f]", lambda found: f"\\{ord(found[0]):03o}", text) + '"'


def _tensor(what: str, tensor: Tensor, batched: bool, backend: Backend) -> dict[str, Any]:
    if tensor.type not in TYPES:
        raise ModelError(
            f"{what} {tensor.name} is {tensor.type}, which Triton does not support; it supports tensors of "
            f"{', '.join(TYPES)}: choose another --target, or export the model without it"
        )
    if not tensor.ranked and backend == "onnxruntime":
        raise ModelError(
            f"the model does not declare the dimensions of {what} {tensor.name}, which Triton's onnxruntime backend "
            "treats as a scalar; declare its shape in the model, or choose --target triton --backend python"
        )
    dims = [dim if isinstance(dim, int) else -1 for dim in tensor.shape[batched:]]
    if 0 in dims:
        raise ModelError(
            f"{what} {tensor.name} has a dimension of 0, which Triton does not support"
            f"; export the model without it, or choose another --target"
        )
    field: dict[str, Any] = {"name": tensor.name, "data_type": EnumValue(TYPES[tensor.type]), "dims": dims or [1]}
    return {**field, "reshape": {"shape": []}} if batched and not dims else field


def _tensorrt(settings: TritonSettings) -> dict[str, Any]:
    keys = {"precision_mode": settings.tensorrt.upper(), "max_workspace_size_bytes": str(1 << 30)}
    return {"name": "tensorrt", "parameters": [_parameter(key, value) for key, value in keys.items()]}


def _parameter(key: str, value: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"key": key, "value": value}


def _warm_ups(model: Servable, settings: TritonSettings) -> Sequence[Mapping[str, Any]]:
    """Return the warm-up runs of one sample and of a full batch."""
    batched = not model.unbatchable
    inputs = [
        _parameter(
            tensor.name,
            {
                "data_type": EnumValue(TYPES[tensor.type]),
                "dims": list(model.feeds[tensor.name].shape[batched:]) or [1],
                "random_data" if tensor.type in ("float", "double", "float16") else "zero_data": True,
            },
        )
        for tensor in model.inputs
    ]
    sizes = sorted({1, settings.max_batch}) if batched else [0]
    return [{"name": f"batch {size}" if size else "sample", "batch_size": size, "inputs": inputs} for size in sizes]
