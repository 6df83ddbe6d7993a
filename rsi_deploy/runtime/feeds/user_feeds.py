"""Input arrays that a user gives for a model (`--feeds`): read, checked and adapted to the model's inputs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, has_shape
from rsi_deploy.runtime.feeds.inputs import InputSpec, list_specs
from rsi_deploy.runtime.feeds.shapes import refuse_empty_batch
from rsi_deploy.runtime.feeds.values import describe_array, is_text


def read_feeds(path: str | Path) -> dict[str, Array]:
    """Read arrays by input name from an `.npz` file.

    Raises:
        UsageError: The file does not exist or contains no arrays.
    """
    try:
        return read_npz(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--feeds {path}: expected an .npz with one array per model input ({error})") from error


def user_feeds(specs: Sequence[InputSpec], feeds: Feeds, model: str) -> dict[str, Array]:
    """Return the arrays after checking them; an input without a batch axis may be repeated for each sample.

    Args:
        specs: inputs of the model.
        feeds: input name -> array.
        model: model name for messages.

    Raises:
        UsageError: The arrays do not fit; the message says what the model takes and what it got.
    """
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs})
    found = {name: np.asarray(array) for name, array in feeds.items()}
    samples = axes.samples(found)
    for spec in specs:
        array = found.get(spec.name, np.empty(0))
        if axes.axes[spec.name] is not None or array.shape != (samples, *array.shape[1:]):
            continue
        if array.ndim == len(spec.shape) + 1 and samples:
            if (array != array[0]).any():
                raise UsageError(
                    f"{model} takes {spec} once for a whole run, as it has no batch axis, but the array has several "
                    "different values",
                    hint="give it once, in that shape",
                )
            found[spec.name] = np.asarray(array[0])
    check_feeds(specs, found, model)
    return found


def check_feeds(specs: Sequence[InputSpec], feeds: Feeds, model: str) -> None:
    """Refuse feeds whose names, types or shapes do not fit the inputs of `model`.

    Raises:
        UsageError: The message says what the model takes and what it got.
    """
    if {spec.name for spec in specs} != set(feeds):
        raise UsageError(f"{model} takes {list_specs(specs)}, but the inputs given are {', '.join(sorted(feeds))}")
    for spec in specs:
        array = feeds[spec.name]
        if not spec.accepts(array.dtype, array.shape):
            advice = f"; store it as array.astype({str(spec.dtype)!r})"
            raise UsageError(
                f"{model} takes {spec}, but the input given is {describe_array(array)}"
                + advice * (has_shape(array.shape, spec.shape) and not is_text(spec.dtype))
            )
    refuse_empty_batch(specs, {name: array.shape for name, array in feeds.items()}, model)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True):
            known, where = sizes.setdefault(dim, (size, spec.name)) if isinstance(dim, str) else (size, "")
            if known != size:
                raise UsageError(
                    f"{model}: {dim} is {known} in {where}, but {size} in {spec.name}", hint="give one size for it"
                )
