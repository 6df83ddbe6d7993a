"""Probe inputs: seeded inputs on which models are compared; `verify` creates the same ones again.

They are random, two samples or as many as a fixed batch has, or they come from a file where random numbers are not
meaningful to a model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.user_feeds import user_feeds
from rsi_deploy.runtime.feeds.values import describe_array, is_text

PROBE_BATCH = 2


def probe_feeds(
    model: Path,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    given: Feeds | None = None,
    examples: Mapping[str, Sequence[int]] | None = None,
    specs: Sequence[InputSpec] | None = None,
) -> dict[str, Array]:
    """Return probe inputs for a model.

    Args:
        model: ONNX file.
        seed: random seed.
        shapes: input name -> whole shape, where dimensions besides the batch are dynamic, or of all inputs as a report
            stores them; batch sizes in them are used as they are.
        given: input name -> array, in place of random inputs.
        examples: input name -> shape with any batch size, for inputs that are not in `shapes`.
        specs: the model's inputs; None reads them from its file.

    Raises:
        UsageError: Shapes or arrays do not fit the model, or a dynamic dimension has no size.
    """
    specs = model_inputs(model) if specs is None else specs
    if given is not None:
        feeds = user_feeds(specs, given, model.name)
        for name, shape in (shapes or {}).items():
            if name in feeds and feeds[name].shape != tuple(shape):
                raise UsageError(
                    f"--feeds and --input-shape contradict each other: {name} is {feeds[name].shape} in --feeds, but "
                    f"{tuple(shape)} in --input-shape",
                    hint="leave out one of them",
                )
        return feeds
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs})
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    fixed = [size for size in firsts if isinstance(size, int)]
    batch = fixed[0] if fixed and len(fixed) == len(firsts) else PROBE_BATCH
    if leading := {shape[0] for name, shape in (shapes or {}).items() if shape and axes.axes.get(name) == 0}:
        batch = max(leading)
    others = axes.with_batch(examples or {}, axes.fixed or (batch if leading else PROBE_BATCH))
    return random_feeds(specs, batch, seed, {**others, **(shapes or {})}, shapes_settle_batch=True)


def feeds_fingerprint(feeds: Feeds) -> str:
    """Return the sha256 (hex) of names, types, shapes and values; text counts without the width of its dtype."""
    digest = hashlib.sha256()
    for name, array in sorted(feeds.items()):
        digest.update(f"{name}\0{describe_array(array)}\0".encode())
        texts = is_text(array.dtype)
        digest.update("\0".join(map(str, array.ravel())).encode() if texts else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
