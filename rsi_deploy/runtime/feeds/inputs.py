"""What a model wants to be fed, and seeded inputs that fit.

    dimension of an input        size
    fixed                        as the model says
    first, dynamic               the batch
    other, dynamic               from `input_shape`, directly or through a symbol that is known by then

Every input draws from a generator of its own, seeded by (seed, input name): another order of inputs, or one
more of them, changes nothing in the rest.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.limits import GENERATED_NUMBERS as MOST_NUMBERS
from rsi_deploy.io.limits import quoted_name
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, Dim, is_batch_name
from rsi_deploy.runtime.feeds.values import TEXT, described, is_text

# onnxruntime's words that are not numpy's
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One model input; a dimension is a number, a symbol (dynamic, named) or None (dynamic, unnamed).

    The dtype of a string tensor is `values.TEXT`.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {'string' if is_text(self.dtype) else self.dtype} ({dims})"


def model_inputs(model: Any, name: str = "") -> list[InputSpec]:
    """The inputs that must be fed (initializers that are inputs too are not among them).

    An optional tensor is fed like a tensor.

    Args:
        model: an `onnxruntime.InferenceSession`, an `onnx.ModelProto`, or the path of an ONNX file.
        name: of the model, for messages; "" takes the file's.

    Raises:
        ModelError: the file cannot be read, or an input is no tensor.
    """
    if hasattr(model, "get_inputs"):
        return [
            _spec_of_runtime(f"{name}: input" if name else "input", value, value.type.removeprefix("optional("))
            for value in model.get_inputs()
        ]
    if not name and isinstance(model, str | Path):
        name = Path(model).name
    return _inputs_of_proto(_loaded(model), f"{name}: input" if name else "input")


def model_outputs(session: Any, name: str) -> list[InputSpec]:
    """The outputs of an `onnxruntime.InferenceSession`, for those who can only pass on tensors.

    Args:
        session: of the model.
        name: of the model, for messages.

    Raises:
        ModelError: an output is no tensor: a sequence, a map or an optional value.
    """
    return [_spec_of_runtime(f"{name}: output", value, value.type) for value in session.get_outputs()]


def random_feeds(
    specs: Sequence[InputSpec],
    batch: int,
    seed: int,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    *,
    shapes_settle_batch: bool = False,
) -> dict[str, npt.NDArray[Any]]:
    """Seeded inputs: standard normal floats, integers 0 or 1 (valid indices of any table), random booleans.

    Integer inputs whose name contains "mask" are all ones: nothing is masked away.

    Args:
        specs: the inputs.
        batch: size of every dynamic first dimension.
        seed: any number of 0 or more.
        input_shape: input name -> its whole shape, batch included; needed where a later dimension is dynamic.
        shapes_settle_batch: take the first sizes in `input_shape` as they are, though they are not `batch`.

    Returns:
        Input name -> array of the input's dtype.

    Raises:
        UsageError: an unknown name or a shape that does not fit, a dynamic dimension left open, or a batch
            that no input takes.
    """
    given = dict(input_shape or {})
    unknown = sorted(set(given) - {spec.name for spec in specs})
    if unknown:
        raise UsageError(f"--input-shape: no input named {', '.join(unknown)}; the model has {_listed(specs)}")
    _refuse_no_samples(specs, given, "--input-shape")
    if batch < 1:
        raise UsageError(f"batch must be 1 or more, but got {batch}")
    symbols: dict[str, int] = {}
    axes = drawn_axes(specs)
    for spec in sorted(specs, key=lambda spec: spec.name not in given):
        _bind(spec, axes[spec.name], batch, given.get(spec.name), symbols, any_batch=shapes_settle_batch)
    _check_batch(specs, batch)
    shapes = _settled(specs, axes, batch, given, symbols)
    feeds = {}
    for spec in specs:
        feeds[spec.name] = _of_shape(spec, shapes[spec.name], seed)
    return feeds


def check_feeds(specs: Sequence[InputSpec], feeds: Mapping[str, npt.NDArray[Any]], model: str) -> None:
    """Refuse feeds whose names, types or shapes are not those of `model`.

    Raises:
        UsageError: says what the model takes and what came.
    """
    wanted, came = {spec.name for spec in specs}, set(feeds)
    if wanted != came:
        raise UsageError(f"{model} takes {_listed(specs)}, but the inputs given are {', '.join(sorted(came))}")
    for spec in specs:
        array = feeds[spec.name]
        fits = len(spec.shape) == array.ndim and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        same = array.dtype == spec.dtype or (is_text(array.dtype) and is_text(spec.dtype))
        if not same or not fits:
            raise UsageError(
                f"{model} takes {spec}, but the input given is {described(array)}"
                + f"; store it as array.astype({str(spec.dtype)!r})" * (fits and not is_text(spec.dtype))
            )
    _refuse_no_samples(specs, {name: array.shape for name, array in feeds.items()}, model)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            known, where = sizes.setdefault(dim, (size, spec.name)) if isinstance(dim, str) else (size, "")
            if known != size:
                raise UsageError(
                    f"{model}: {dim} is {known} in {where}, but {size} in {spec.name}; give one size for it"
                )


def parse_shape(text: str | tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Read `1x3x32x32`; a size of 0 is an empty cache, say.

    Example:
        >>> parse_shape("1x3x32x32"), parse_shape("1x0x48")
        ((1, 3, 32, 32), (1, 0, 48))
    """
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in (text.lower().split("x") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        shape = ()
    if not shape or min(shape) < 0:
        raise UsageError(
            f"--input-shape must be positive numbers joined by x, such as 1x3x32x32 (0 where an input is empty), but "
            f"got {text!r}"
        )
    return shape


def drawn_axes(specs: Sequence[InputSpec]) -> dict[str, int | None]:
    """Input name -> the axis that is as long as the batch; None where the model fixes its first size, or has none."""
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs}).axes
    return {spec.name: axes[spec.name] if not isinstance((*spec.shape, 0)[0], int) else None for spec in specs}


def _bind(
    spec: InputSpec,
    batch_axis: int | None,
    batch: int,
    given: Sequence[int] | None,
    symbols: dict[str, int],
    *,
    any_batch: bool,
) -> None:
    """Note the size of every symbol that the batch or the given shape of one input settles."""
    if given is not None and (len(given) != len(spec.shape) or any(size < 0 for size in given)):
        raise UsageError(f"--input-shape: {spec} needs {len(spec.shape)} sizes of 0 or more, but got {tuple(given)}")
    for axis, dim in enumerate(spec.shape):
        size = batch if axis == batch_axis else None
        if given is not None:
            if isinstance(dim, int) and dim != given[axis]:
                raise UsageError(
                    f"--input-shape: {spec} has {dim} fixed at axis {axis}, but got {tuple(given)}; give {dim} there"
                )
            if size is not None and size != given[axis] and not any_batch:
                raise UsageError(
                    f"--input-shape: {spec} takes the batch {f'at axis {axis}' if axis else 'first'}, which is "
                    f"{batch}, but got {tuple(given)}; pass --batch {given[axis]} with it"
                )
            size = given[axis]
        elif any_batch and size is not None and isinstance(dim, str):
            size = symbols.get(dim, size)
        if isinstance(dim, str) and size is not None and symbols.setdefault(dim, size) != size:
            raise UsageError(
                f"--input-shape: {dim} of {spec} is {size}, but {symbols[dim]} elsewhere"
                f"; give one size for {dim} everywhere"
            )


def _resolved(spec: InputSpec, batch_axis: int | None, batch: int, symbols: Mapping[str, int]) -> list[Dim]:
    """The sizes of an input; a dimension that nothing settles stays as it is."""
    return [
        dim if isinstance(dim, int) else symbols.get(dim or "", batch if axis == batch_axis else dim)
        for axis, dim in enumerate(spec.shape)
    ]


def _open_axes(sizes: Sequence[Dim]) -> list[int]:
    return [axis for axis, dim in enumerate(sizes) if not isinstance(dim, int)]


def unsettled_inputs(specs: Sequence[InputSpec], input_shape: Mapping[str, Sequence[int]] | None = None) -> set[str]:
    """Names of the inputs with an axis beside the batch whose size nobody has given.

    Args:
        specs: the inputs.
        input_shape: input name -> its whole shape.
    """
    given = dict(input_shape or {})
    axes = drawn_axes(specs)
    symbols: dict[str, int] = {}
    for spec in specs:
        sizes = given.get(spec.name, [1 if axis == axes[spec.name] else -1 for axis in range(len(spec.shape))])
        symbols |= {
            dim: size for dim, size in zip(spec.shape, sizes, strict=False) if isinstance(dim, str) and size >= 0
        }
    return {s.name for s in specs if s.name not in given and _open_axes(_resolved(s, axes[s.name], 1, symbols))}


def _settled(
    specs: Sequence[InputSpec],
    axes: Mapping[str, int | None],
    batch: int,
    given: Mapping[str, Sequence[int]],
    symbols: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The shapes of all inputs; axes whose size nobody has given are refused, with shapes that would do."""
    sizes = {s.name: given.get(s.name) or _resolved(s, axes[s.name], batch, symbols) for s in specs}
    unsettled = [spec for spec in specs if _open_axes(sizes[spec.name])]
    if not unsettled:
        return {name: tuple(dim for dim in dims if isinstance(dim, int)) for name, dims in sizes.items()}
    spec = unsettled[0]
    places = _open_axes(sizes[spec.name])
    names = ", ".join(str(spec.shape[axis] or f"axis {axis}") for axis in places)
    examples = [f"{each.name}={'x'.join(map(str, example_shape(each, sizes[each.name], batch)))}" for each in unsettled]
    raise UsageError(
        f"input {spec} leaves {'axis' if len(places) == 1 else 'axes'} {' and '.join(map(str, places))} open; give its "
        f"whole shape: {' '.join(f'--input-shape {example}' for example in examples)} (with a size of your own for "
        f"{names}), or data that have it"
    )


def example_shape(spec: InputSpec, sizes: Sequence[Dim], batch: int) -> list[int]:
    """A shape that would do for an input: 224 for pictures, 1 for caches, 128 for anything else that is open.

    Example:
        >>> ids = InputSpec(name="ids", dtype=np.dtype(np.int64), shape=("n", "s"))
        >>> example_shape(ids, (2, "s"), 2)
        [2, 128]
        >>> state = InputSpec(name="state", dtype=np.dtype(np.float32), shape=(2, None, 64))
        >>> example_shape(state, (2, None, 64), 3)
        [2, 3, 64]
    """
    is_picture = len(spec.shape) == 4 and bool({1, 3, 4} & {spec.shape[1], spec.shape[3]})
    found = []
    for dim in sizes:
        name = f"{spec.name} {dim or ''}".lower()
        if isinstance(dim, int):
            found.append(dim)
        elif is_batch_name(dim or ""):
            found.append(batch)
        elif re.search("past|cache|state|hidden|kv", name):
            is_batch = len(found) == 1 and isinstance(spec.shape[0], int)  # (layers, batch, width)
            found.append(batch if is_batch else 1)
        else:
            found.append(224 if is_picture or re.fullmatch("h|w|height|width", dim or "") else 128)
    return found


def _refuse_no_samples(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """A batch of nothing is no run; other axes may be empty."""
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs}).axes
    for spec in specs:
        axis, shape = axes[spec.name], shapes.get(spec.name, ())
        if axis is not None and axis < len(shape) and shape[axis] == 0:
            raise UsageError(
                f"{where}: {spec} has the batch at axis {axis}, which must be 1 or more, but got {tuple(shape)}"
            )


def _check_batch(specs: Sequence[InputSpec], batch: int) -> None:
    """A batch that nothing in the model takes would be a lie in the result."""
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    if firsts and batch != 1 and all(isinstance(dim, int) and dim != batch for dim in firsts):
        raise UsageError(
            f"the batch is fixed in this model: {_listed(specs)}, but got {batch}; "
            f"take a batch of {firsts[0]}, or export the model with a dynamic batch"
        )


def _of_shape(spec: InputSpec, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """The input, drawn from a generator of its own."""
    if math.prod(shape) > MOST_NUMBERS:
        raise UsageError(
            f"input {quoted_name(spec.name)} of the shape {shape} has more than {MOST_NUMBERS} numbers; "
            "give a smaller shape or batch"
        )
    return _drawn(spec, shape, np.random.default_rng([seed, *spec.name.encode()]))


def _drawn(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[Any]:
    if is_text(spec.dtype):
        raise UsageError(
            f"input {spec} takes texts, which are not drawn at random; give them in an .npz file: --feeds FILE.npz"
        )
    if spec.dtype.kind in "iu":
        values = np.ones(shape) if "mask" in spec.name.lower() else rng.integers(0, 2, shape)
    elif spec.dtype.kind == "b":
        values = rng.integers(0, 2, shape)
    else:
        values = rng.standard_normal(shape)
    return np.asarray(values).astype(spec.dtype)


def _listed(specs: Sequence[InputSpec]) -> str:
    return "; ".join(str(spec) for spec in specs) or "no inputs"


def _spec_of_runtime(what: str, value: Any, type_name: str) -> InputSpec:
    """A value of a session; of the type `tensor(float)`, say."""
    inner = type_name.removeprefix("tensor(").rstrip(")")
    try:
        if not type_name.startswith("tensor("):
            raise TypeError
        if inner.startswith(("bfloat", "float8", "float4", "int4", "uint4", "int2", "uint2")):
            import ml_dtypes

            inner = getattr(ml_dtypes, inner)
        dtype = TEXT if inner == "string" else np.dtype(_DTYPES.get(inner, inner))
    except (TypeError, AttributeError):
        raise _no_tensor(what, value.name, value.type) from None
    shape = tuple(dim if isinstance(dim, int | str) else None for dim in value.shape)
    return InputSpec(name=value.name, dtype=dtype, shape=shape)


def _no_tensor(what: str, name: str, type_name: str) -> ModelError:
    return ModelError(
        f"{what} {name} is {type_name}, but only tensors of numbers and strings can be handled here"
        "; export a model without it"
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
            raise _no_tensor(what, value.name, f"a {kind}" if kind != "of no type" else kind)
        if not tensor.HasField("shape"):
            raise ModelError(f"{what} {value.name} has no shape, not even a rank; run onnx.shape_inference first")
        dims = tuple(dim_of(dim) for dim in tensor.shape.dim)
        is_string = tensor.elem_type == onnx.TensorProto.STRING
        dtype: np.dtype[Any] = TEXT if is_string else onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        specs.append(InputSpec(name=value.name, dtype=dtype, shape=dims))
    return specs


def dim_of(dim: Any) -> Dim:
    """A size, a symbol or None; some exporters write -1 where a size is dynamic."""
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value >= 0 else None
    return dim.dim_param or None


def _loaded(model: Any) -> Any:
    """A ModelProto from itself or from a path, without its external weights."""
    if not isinstance(model, str | Path):
        return model
    from rsi_deploy.io.onnx_reader import read_proto

    return read_proto(model)
