"""Arrays that a user gives to run a model with, as the model takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec, check_feeds

Feeds = dict[str, npt.NDArray[Any]]


def given_feeds(specs: Sequence[InputSpec], feeds: Mapping[str, npt.NDArray[Any]], model: str) -> Feeds:
    """The arrays, checked; an input without a batch axis may be given once for each sample, where all are equal.

    Args:
        specs: the model's inputs.
        feeds: input name -> array.
        model: its name, for messages.

    Raises:
        UsageError: says what the model takes and what came.
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
                    f"{model} takes {spec} once for a whole run, for it has no batch axis, but the input given holds "
                    f"several values; give it once, in that shape"
                )
            found[spec.name] = np.asarray(array[0])
    check_feeds(specs, found, model)
    return found
