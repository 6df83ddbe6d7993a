"""Arrays in memory as one row a sample, `(N, ...)`, whatever way they are given for a model's inputs.

the input's batch axis      given as                                   becomes
0                           (N, ...)                                   itself
1 of (2, batch, 128)        (2, N, 128), or (N, 2, 128)                (N, 2, 128)
1 of (2, batch, 128)        (2, 1, 128), or (2, 128): for every sample (N, 2, 128), all rows equal
none: (), (3,), (1, 64)     its own shape: for every run               (N, *shape), all rows equal
none: (), (3,), (1, 64)     (N, *shape)                                itself; its rows must be equal
"""

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import Array
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, Dim
from rsi_deploy.runtime.feeds.inputs import InputSpec


def sample_rows(
    arrays: Mapping[str, Array], specs: Sequence[InputSpec], labels: int | None, name: str
) -> dict[str, Array]:
    """One row a sample for each input.

    Args:
        arrays: of the data; those of other names are left out.
        specs: the model's inputs.
        labels: how many labels there are; None without labels.
        name: of the data, for messages.

    Returns:
        Input name -> array `(N, ...)`, a view where it can be one.

    Raises:
        UsageError: an input without an array, or arrays that do not fit the inputs or each other.
    """
    check_names(list(arrays), [spec.name for spec in specs], name)
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs})
    chosen = {spec.name: arrays[spec.name] for spec in specs}
    counts = {spec.name: _count(chosen[spec.name], spec, axes) for spec in specs}
    known = {count for count in counts.values() if count is not None}
    likely = known or _other_counts(chosen, specs, axes)
    if labels is None and not likely and any(axis is not None for axis in axes.axes.values()):
        there = ", ".join(f"{key} {array.shape}" for key, array in chosen.items())
        raise UsageError(f"data: {name} holds {there}; expected for each input one row a sample: {_listed(specs)}")
    samples = labels if labels is not None else max(likely, default=1)
    if known - {samples}:
        told = "" if labels is None else f" for {labels} labels"
        lengths = {key: count for key, count in counts.items() if count is not None}
        raise UsageError(
            f"data: {name}: every input needs as many samples as the others, but got {lengths}{told}"
            f"; store one row a sample of each"
        )
    return {spec.name: _rows(chosen[spec.name], spec, axes.axes[spec.name], samples, name) for spec in specs}


def check_names(there: Sequence[str], names: Sequence[str], name: str) -> None:
    """Refuse data that lack an array for an input.

    Raises:
        UsageError: names what is missing, what there is, and what is spelled nearly so.
    """
    if absent := [wanted for wanted in names if wanted not in there]:
        raise UsageError(
            f"data: {name} has no array for the input{'s' * (len(absent) > 1)} {', '.join(absent)}; it holds "
            f"{', '.join(there) or 'nothing'}{near_names(absent, there)}; store one array for each input under its name"
        )


def near_names(names: Sequence[str], there: Sequence[str]) -> str:
    """Which of the names there may be meant, in brackets; "" where none is like one.

    Example:
        >>> near_names(["input_ids"], ["inputids", "mask"])
        ' (perhaps inputids is input_ids)'
    """
    near = [(found, name) for name in names for found in difflib.get_close_matches(name, there, n=1) if found != name]
    return f" (perhaps {', '.join(f'{found} is {name}' for found, name in near)})" if near else ""


def _count(array: Array, spec: InputSpec, axes: BatchAxes) -> int | None:
    """How many samples an array holds; None where it is for every run, or where its shape does not tell."""
    axis = axes.axes[spec.name]
    if axis is None or array.ndim != len(spec.shape):
        return None
    is_whole = isinstance(spec.shape[axis], int) and fits(array.shape, spec.shape)
    if axis == 0:
        return None if is_whole and len(axes.axes) > 1 else len(array)
    is_own = fits(array.shape, _with_open(spec.shape, axis))
    is_rows = fits(array.shape[1:], (*spec.shape[:axis], *spec.shape[axis + 1 :]))
    if is_own and (is_rows or array.shape[axis] == 1):
        return None
    return array.shape[axis] if is_own else len(array)


def _other_counts(arrays: Mapping[str, Array], specs: Sequence[InputSpec], axes: BatchAxes) -> set[int]:
    """Samples where no array tells them for certain: of whole batches, or of inputs without a batch axis."""
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
        if fits(array.shape, own):
            return _repeated(array, samples)
        if single and array.size == 1:
            return _repeated(array.reshape(numbers), samples)
        if single and array.shape == (samples,):
            return array.reshape(samples, *numbers)
        if array.ndim == rank + 1 and len(array) == samples and fits(array.shape[1:], own):
            return array
    elif axis == 0:
        if array.ndim == rank and len(array) == samples:
            return array
        if isinstance(own[0], int) and fits(array.shape, own):
            return _repeated(array, samples)
        if array.ndim and len(array) == samples:
            return array  # `as_input` says what is wrong with its shape
    else:
        rest = (*own[:axis], *own[axis + 1 :])
        if array.ndim == rank and array.shape[axis] in (samples, 1) and fits(array.shape, _with_open(own, axis)):
            rows = np.moveaxis(array, axis, 0)
            return rows if len(rows) == samples else _repeated(rows[0], samples)
        if array.ndim == rank and len(array) == samples and fits(array.shape[1:], rest):
            return array
        if fits(array.shape, rest):
            return _repeated(array, samples)
    what = "has no batch axis: give its value once, in that shape" if axis is None else f"has the batch at axis {axis}"
    raise UsageError(
        f"data: {name}: the input {spec} {what}, but got {array.dtype} {array.shape} for {samples} samples"
        f"; store one row a sample, or one array for all of them"
    )


def fits(shape: Sequence[int], dims: Sequence[Dim]) -> bool:
    """Whether an array of this shape has as many axes, and the sizes that are fixed."""
    return len(shape) == len(dims) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True)
    )


def _listed(specs: Sequence[InputSpec]) -> str:
    return "; ".join(map(str, specs))


def _with_open(dims: Sequence[Dim], axis: int) -> tuple[Dim, ...]:
    return (*dims[:axis], None, *dims[axis + 1 :])


def _repeated(array: Array, samples: int) -> Array:
    return np.broadcast_to(array, (samples, *array.shape))
