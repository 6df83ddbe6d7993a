"""Concrete shapes for a model's inputs, from the batch size and the shapes that the user gives (`--input-shape`).

dimension of an input        size
fixed                        as in the model
batch axis, dynamic          the batch size
other, dynamic               from `input_shape`, directly or through a symbol whose size is known
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Shape
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, Dim, is_batch_name
from rsi_deploy.runtime.feeds.inputs import InputSpec, list_specs, model_inputs


def parse_shape(text: str | Shape | None) -> Shape | None:
    """Parse `1x3x32x32`; a size may be 0, as for an empty cache.

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


def named_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """Parse texts such as `NAME=1x128`.

    Example:
        >>> named_shapes(["ids=2x128"])
        {'ids': (2, 128)}
    """
    shapes = {}
    for text in texts:
        name, equals, shape = text.rpartition("=")
        if not equals or not name:
            raise UsageError(f"--input-shape takes NAME=1x128, with the input's name, but got {text!r}")
        shapes[name] = parse_shape(shape) or ()
    return shapes


def input_shapes(texts: Sequence[str]) -> tuple[str | None, dict[str, Shape]]:
    """Separate the one shape of a torch model's input from those by name.

    Raises:
        UsageError: several shapes without a name.

    Example:
        >>> input_shapes(["1x3x32x32"]), input_shapes(["ids=1x128"])
        (('1x3x32x32', {}), (None, {'ids': (1, 128)}))
    """
    nameless = [text for text in texts if "=" not in text]
    if len(nameless) > 1:
        raise UsageError(
            f"--input-shape takes one shape without a name, but got {', '.join(nameless)}",
            hint="for an ONNX file, type NAME=1x128 for each input",
        )
    return next(iter(nameless), None), named_shapes([text for text in texts if "=" in text])


def refuse_nameless(shape: str | Shape | None, model: Path) -> None:
    """Refuse a shape without an input's name for an ONNX file.

    Raises:
        UsageError: the message names the inputs.
    """
    if shape is not None:
        text = shape if isinstance(shape, str) else "x".join(map(str, shape))
        specs = model_inputs(model)
        raise UsageError(
            f"--input-shape {text} names no input of {model.name}, which takes {list_specs(specs)}",
            hint=f"type --input-shape {specs[0].name if specs else 'NAME'}={text}",
        )


def dynamic_batch_axes(specs: Sequence[InputSpec]) -> dict[str, int | None]:
    """Return the batch axis of each input by name; None where the model fixes its first size or it has no batch."""
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs}).axes
    return {spec.name: axes[spec.name] if not isinstance((*spec.shape, 0)[0], int) else None for spec in specs}


def concrete_shapes(
    specs: Sequence[InputSpec],
    batch: int,
    input_shape: Mapping[str, Sequence[int]],
    *,
    shapes_settle_batch: bool = False,
) -> dict[str, Shape]:
    """Return a concrete shape for every input; arguments and errors as for `random_feeds`."""
    unknown = sorted(set(input_shape) - {spec.name for spec in specs})
    if unknown:
        raise UsageError(
            f"--input-shape: no input named {', '.join(unknown)}", hint=f"the model has {list_specs(specs)}"
        )
    refuse_empty_batch(specs, input_shape, "--input-shape")
    if batch < 1:
        raise UsageError(f"batch must be 1 or more, but got {batch}")
    axes = dynamic_batch_axes(specs)
    symbols: dict[str, int] = {}
    for spec in sorted(specs, key=lambda spec: spec.name not in input_shape):
        shape = input_shape.get(spec.name)
        _bind_symbols_(symbols, spec, axes[spec.name], batch, shape, any_batch=shapes_settle_batch)
    _check_batch(specs, batch)
    sizes = {spec.name: input_shape.get(spec.name) or _sizes(spec, axes[spec.name], batch, symbols) for spec in specs}
    unsettled = [spec for spec in specs if _open_axes(sizes[spec.name])]
    if unsettled:
        raise _open_axes_error(unsettled, sizes, batch)
    return {name: tuple(dim for dim in dims if isinstance(dim, int)) for name, dims in sizes.items()}


def unsettled_inputs(specs: Sequence[InputSpec], input_shape: Mapping[str, Sequence[int]] | None = None) -> set[str]:
    """Return the names of inputs that have a dynamic axis of unknown size besides the batch.

    Args:
        specs: inputs of the model.
        input_shape: input name -> its whole shape.
    """
    known = dict(input_shape or {})
    axes = dynamic_batch_axes(specs)
    symbols: dict[str, int] = {}
    for spec in specs:
        sizes = known.get(spec.name, [1 if axis == axes[spec.name] else -1 for axis in range(len(spec.shape))])
        symbols |= {
            dim: size for dim, size in zip(spec.shape, sizes, strict=False) if isinstance(dim, str) and size >= 0
        }
    return {s.name for s in specs if s.name not in known and _open_axes(_sizes(s, axes[s.name], 1, symbols))}


def refuse_empty_batch(specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Refuse a batch of size 0; other axes may be empty."""
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs}).axes
    for spec in specs:
        axis, shape = axes[spec.name], shapes.get(spec.name, ())
        if axis is not None and axis < len(shape) and shape[axis] == 0:
            raise UsageError(
                f"{where}: {spec} has the batch at axis {axis}, which must be 1 or more, but got {tuple(shape)}"
            )


def example_shape(spec: InputSpec, sizes: Sequence[Dim], batch: int) -> list[int]:
    """Suggest a shape for an input: 224 for pictures, 1 for caches, 128 for other open dimensions.

    Example:
        >>> import numpy as np
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


def _bind_symbols_(
    symbols: dict[str, int],
    spec: InputSpec,
    batch_axis: int | None,
    batch: int,
    shape: Sequence[int] | None,
    *,
    any_batch: bool,
) -> None:
    """Add to `symbols` the sizes that follow from the batch or from the user's shape of one input."""
    if shape is not None and (len(shape) != len(spec.shape) or any(size < 0 for size in shape)):
        raise UsageError(f"--input-shape: {spec} needs {len(spec.shape)} sizes of 0 or more, but got {tuple(shape)}")
    for axis, dim in enumerate(spec.shape):
        size = batch if axis == batch_axis else None
        if shape is not None:
            if isinstance(dim, int) and dim != shape[axis]:
                raise UsageError(
                    f"--input-shape: {spec} has {dim} fixed at axis {axis}, but got {tuple(shape)}",
                    hint=f"give {dim} there",
                )
            if size is not None and size != shape[axis] and not any_batch:
                raise UsageError(
                    f"--input-shape: {spec} has the batch {(f'at axis {axis}' if axis else 'first')}, which is "
                    f"{batch}, but got {tuple(shape)}",
                    hint=f"pass --batch {shape[axis]} with it",
                )
            size = shape[axis]
        elif any_batch and size is not None and isinstance(dim, str):
            size = symbols.get(dim, size)
        if isinstance(dim, str) and size is not None and symbols.setdefault(dim, size) != size:
            raise UsageError(
                f"--input-shape: {dim} of {spec} is {size}, but {symbols[dim]} elsewhere",
                hint=f"give one size for {dim} everywhere",
            )


def _sizes(spec: InputSpec, batch_axis: int | None, batch: int, symbols: Mapping[str, int]) -> list[Dim]:
    """Return the sizes of an input; a dimension whose size is unknown stays as it is."""
    return [
        dim if isinstance(dim, int) else symbols.get(dim or "", batch if axis == batch_axis else dim)
        for axis, dim in enumerate(spec.shape)
    ]


def _open_axes(sizes: Sequence[Dim]) -> list[int]:
    return [axis for axis, dim in enumerate(sizes) if not isinstance(dim, int)]


def _open_axes_error(unsettled: Sequence[InputSpec], sizes: Mapping[str, Sequence[Dim]], batch: int) -> UsageError:
    """Return the error for dynamic axes of unknown size, with example shapes for all of them."""
    spec = unsettled[0]
    places = _open_axes(sizes[spec.name])
    names = ", ".join(str(spec.shape[axis] or f"axis {axis}") for axis in places)
    examples = [f"{each.name}={'x'.join(map(str, example_shape(each, sizes[each.name], batch)))}" for each in unsettled]
    return UsageError(
        f"input {spec} leaves {('axis' if len(places) == 1 else 'axes')} {' and '.join(map(str, places))} open",
        hint=f"give its whole shape: {' '.join(f'--input-shape {example}' for example in examples)} (with your own "
        f"size for {names}), or data that have it (--feeds FILE.npz, one array for each input)",
    )


def _check_batch(specs: Sequence[InputSpec], batch: int) -> None:
    """Refuse a batch size that no input of a model with a fixed batch has."""
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    if firsts and batch != 1 and all(isinstance(dim, int) and dim != batch for dim in firsts):
        raise UsageError(
            f"the batch is fixed in this model: {list_specs(specs)}, but got {batch}",
            hint=f"take a batch of {firsts[0]}, or export the model with a dynamic batch",
        )
