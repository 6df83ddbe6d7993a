"""The inputs of a model: names, types and shapes, read from an ONNX file or a session."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Shape
from rsi_deploy.runtime.feeds.batch_axes import Dim, has_shape
from rsi_deploy.runtime.feeds.cache_widths import cache_widths
from rsi_deploy.runtime.feeds.values import TEXT, is_text

# onnxruntime's type names that differ from numpy's
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: name of the input.
        dtype: type of its elements; `values.TEXT` for strings.
        shape: a dimension is a number, a symbol (dynamic, named) or None (dynamic, unnamed).
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {'string' if is_text(self.dtype) else self.dtype} ({dims})"

    def accepts(self, dtype: np.dtype[Any], shape: Shape) -> bool:
        """Return whether an array of this type and shape fits the input."""
        same = dtype == self.dtype or (is_text(dtype) and is_text(self.dtype))
        return same and has_shape(shape, self.shape)


def list_specs(specs: Sequence[InputSpec]) -> str:
    """Describe inputs in a message."""
    return "; ".join(str(spec) for spec in specs) or "no inputs"


def model_inputs(model: Any, name: str = "") -> list[InputSpec]:
    """Return the inputs that must be fed: those without an initializer. An optional tensor counts as a tensor.

    Caches have a fixed width wherever the graph shows it, even if their last dimension is open.

    Args:
        model: an `onnxruntime.InferenceSession`, an `onnx.ModelProto`, or the path of an ONNX file.
        name: model name for messages; "" takes the file's.

    Raises:
        ModelError: The file cannot be read, or an input is not a tensor.
    """
    if hasattr(model, "get_inputs"):
        what = f"{name}: input" if name else "input"
        specs = [_spec_of_runtime(what, value, value.type.removeprefix("optional(")) for value in model.get_inputs()]
        path = getattr(model, "_model_path", None)  # onnxruntime tells no widths
        if path is None or Path(path).suffix != ".onnx" or not any(map(_is_open_cache, specs)):
            return specs
        return _with_widths(specs, _read(path))
    if isinstance(model, str | Path):
        name, model = name or Path(model).name, _read(model)
    return _with_widths(_inputs_of_proto(model, f"{name}: input" if name else "input"), model)


def _read(path: str | Path) -> Any:
    from rsi_deploy.io.onnx_reader import read_proto

    return read_proto(path)


def _is_open_cache(spec: InputSpec) -> bool:
    return spec.name.startswith("past") and len(spec.shape) > 3 and not isinstance(spec.shape[-1], int)


def _with_widths(specs: list[InputSpec], proto: Any) -> list[InputSpec]:
    """Settle the widths of caches."""
    if not any(map(_is_open_cache, specs)):
        return specs
    widths = cache_widths(proto)
    return [
        replace(spec, shape=(*spec.shape[:-1], widths[spec.name]))
        if _is_open_cache(spec) and spec.name in widths
        else spec
        for spec in specs
    ]


def model_outputs(session: Any, name: str) -> list[InputSpec]:
    """Return the outputs of an `onnxruntime.InferenceSession`, for callers that can only pass on tensors.

    Args:
        session: session of the model.
        name: model name for messages.

    Raises:
        ModelError: An output is a sequence, a map or an optional value.
    """
    return [_spec_of_runtime(f"{name}: output", value, value.type) for value in session.get_outputs()]


def _spec_of_runtime(what: str, value: Any, type_name: str) -> InputSpec:
    """Describe an input or output of a session; `type_name` is `tensor(float)`, for example."""
    inner = type_name.removeprefix("tensor(").rstrip(")")
    try:
        if not type_name.startswith("tensor("):
            raise TypeError
        if inner.startswith(("bfloat", "float8", "float4", "int4", "uint4", "int2", "uint2")):
            import ml_dtypes

            inner = getattr(ml_dtypes, inner)
        dtype = TEXT if inner == "string" else np.dtype(_DTYPES.get(inner, inner))
    except (TypeError, AttributeError):
        raise _not_a_tensor(what, value.name, value.type) from None
    shape = tuple(dim if isinstance(dim, int | str) else None for dim in value.shape)
    return InputSpec(name=value.name, dtype=dtype, shape=shape)


def _not_a_tensor(what: str, name: str, type_name: str) -> ModelError:
    return ModelError(
        f"{what} {name} is {type_name}, but only tensors of numbers and strings are supported",
        hint="export a model without it",
    )


def _inputs_of_proto(proto: Any, what: str) -> list[InputSpec]:
    import onnx

    initializers = {tensor.name for tensor in proto.graph.initializer}
    specs = []
    for value in proto.graph.input:
        if value.name in initializers:
            continue
        declared = value.type
        if declared.WhichOneof("value") == "optional_type":
            declared = declared.optional_type.elem_type
        tensor = declared.tensor_type
        known = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
        if not declared.HasField("tensor_type") or tensor.elem_type not in known:
            kind = (value.type.WhichOneof("value") or "of no type").removesuffix("_type").replace("_", " ")
            raise _not_a_tensor(what, value.name, f"a {kind}" if kind != "of no type" else kind)
        if not tensor.HasField("shape"):
            raise ModelError(
                f"{what} {value.name} has no shape, not even a rank", hint="run onnx.shape_inference first"
            )
        dims = tuple(dim_of(dim) for dim in tensor.shape.dim)
        is_string = tensor.elem_type == onnx.TensorProto.STRING
        dtype: np.dtype[Any] = TEXT if is_string else onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        specs.append(InputSpec(name=value.name, dtype=dtype, shape=dims))
    return specs


def dim_of(dim: Any) -> Dim:
    """Return a dimension's size, symbol or None; some exporters write -1 for a dynamic size."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return dim.dim_param or None
