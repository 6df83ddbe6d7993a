"""Convert arrays in memory to one row per sample, `(N, ...)`, from any accepted form for a model's inputs.

batch axis of the input     form of the array                          result
0                           (N, ...)                                   itself
1 of (2, batch, 128)        (2, N, 128), or (N, 2, 128)                (N, 2, 128)
1 of (2, batch, 128)        (2, 1, 128), or (2, 128): for all samples  (N, 2, 128), all rows equal
none: (), (3,), (1, 64)     its own shape: for every run               (N, *shape), all rows equal
none: (), (3,), (1, 64)     (N, *shape)                                itself; its rows must be equal
"""

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, has_shape, open_axis
from rsi_deploy.runtime.feeds.inputs import InputSpec, list_specs


def sample_rows(
    arrays: Mapping[str, Array], specs: Sequence[InputSpec], labels: int | None, name: str
) -> dict[str, Array]:
    """Return one row per sample for each input.

    Args:
        arrays: arrays of the data; those that are not inputs are ignored.
        specs: inputs of the model.
        labels: number of labels; None without labels.
        name: name of the data for messages.

    Returns:
        Input name -> array `(N, ...)`, a view if possible.

    Raises:
        UsageError: An input has no array, or arrays do not fit the inputs or each other.
    """
    check_names(list(arrays), [spec.name for spec in specs], name)
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs})
    chosen = {spec.name: arrays[spec.name] for spec in specs}
    counts = {spec.name: _count(chosen[spec.name], spec, axes) for spec in specs}
    known = {count for count in counts.values() if count is not None}
    likely = known or _other_counts(chosen, specs, axes)
    if labels is None and not likely and any(axis is not None for axis in axes.axes.values()):
        shapes = ", ".join(f"{key} {array.shape}" for key, array in chosen.items())
        raise UsageError(
            f"data: {name} has {shapes}", hint=f"expected one row per sample for each input: {list_specs(specs)}"
        )
    samples = labels if labels is not None else max(likely, default=1)
    if known - {samples}:
        suffix = "" if labels is None else f" for {labels} labels"
        lengths = {key: count for key, count in counts.items() if count is not None}
        raise UsageError(
            f"data: {name}: all inputs must have the same number of samples, but got {lengths}{suffix}",
            hint="store one row per sample for each",
        )
    return {spec.name: _rows(chosen[spec.name], spec, axes.axes[spec.name], samples, name) for spec in specs}


def check_names(present: Sequence[str], names: Sequence[str], name: str) -> None:
    """Refuse data that have no array for an input.

    Raises:
        UsageError: The message lists the missing names, the present ones, and similar spellings.
    """
    if absent := [input_name for input_name in names if input_name not in present]:
        raise UsageError(
            f"data: {name} has no array for the input{'s' * (len(absent) > 1)} {', '.join(absent)}; it has "
            f"{', '.join(present) or 'none'}{suggest_names(absent, present)}",
            hint="store one array for each input under its name",
        )


def suggest_names(names: Sequence[str], present: Sequence[str]) -> str:
    """Suggest present names that are similar to the missing ones, in brackets; "" if none is.

    Example:
        >>> suggest_names(["input_ids"], ["inputids", "mask"])
        ' (perhaps inputids is input_ids)'
    """
    near = [(found, name) for name in names for found in difflib.get_close_matches(name, present, n=1) if found != name]
    return f" (perhaps {', '.join(f'{found} is {name}' for found, name in near)})" if near else ""


def _count(array: Array, spec: InputSpec, axes: BatchAxes) -> int | None:
    """Return the number of samples in an array, or None if it is for every run or its shape is ambiguous."""
    axis = axes.axes[spec.name]
    if axis is None or array.ndim != len(spec.shape):
        return None
    is_whole = isinstance(spec.shape[axis], int) and has_shape(array.shape, spec.shape)
    if axis == 0:
        return None if is_whole and len(axes.axes) > 1 else len(array)
    is_own = has_shape(array.shape, open_axis(spec.shape, axis))
    is_rows = has_shape(array.shape[1:], (*spec.shape[:axis], *spec.shape[axis + 1 :]))
    if is_own and (is_rows or array.shape[axis] == 1):
        return None
    return array.shape[axis] if is_own else len(array)


def _other_counts(arrays: Mapping[str, Array], specs: Sequence[InputSpec], axes: BatchAxes) -> set[int]:
    """Return likely numbers of samples if no array determines them: of whole batches, or without a batch axis."""
    batched = {
        arrays[spec.name].shape[axis]
        for spec in specs
        if (axis := axes.axes[spec.name]) is not None and arrays[spec.name].ndim == len(spec.shape)
    }
    once = {s.name for s in specs if axes.axes[s.name] is None and arrays[s.name].ndim == len(s.shape) + 1}
    return batched or {len(arrays[name]) for name in once}


def _rows(array: Array, spec: InputSpec, axis: int | None, samples: int, name: str) -> Array:
    own, rank = spec.shape, len(spec.shape)
    if axis is None:
        numbers = [dim for dim in own if isinstance(dim, int)]
        single = len(numbers) == rank and math.prod(numbers) == 1
        if has_shape(array.shape, own):
            return _repeated(array, samples)
        if single and array.size == 1:
            return _repeated(array.reshape(numbers), samples)
        if single and array.shape == (samples,):
            return array.reshape(samples, *numbers)
        if array.ndim == rank + 1 and len(array) == samples and has_shape(array.shape[1:], own):
            return array
    elif axis == 0:
        if array.ndim == rank and len(array) == samples:
            return array
        if isinstance(own[0], int) and has_shape(array.shape, own):
            return _repeated(array, samples)
        if array.ndim and len(array) == samples:
            return array  # `as_input` reports the wrong shape
    else:
        rest = (*own[:axis], *own[axis + 1 :])
        if array.ndim == rank and array.shape[axis] in (samples, 1) and has_shape(array.shape, open_axis(own, axis)):
            rows = np.moveaxis(array, axis, 0)
            return rows if len(rows) == samples else _repeated(rows[0], samples)
        if array.ndim == rank and len(array) == samples and has_shape(array.shape[1:], rest):
            return array
        if has_shape(array.shape, rest):
            return _repeated(array, samples)
    what = "has no batch axis: give its value once, in that shape" if axis is None else f"has the batch at axis {axis}"
    raise UsageError(
        f"data: {name}: the input {spec} {what}, but got {array.dtype} {array.shape} for {samples} samples",
        hint="store one row per sample, or one array for all of them",
    )


def _repeated(array: Array, samples: int) -> Array:
    return np.broadcast_to(array, (samples, *array.shape))
