"""Probe inputs: the seeded inputs on which models are held against each other, made again by `verify`.

They are random (`random_feeds`), two samples, or the model's own batch where it is fixed; or they are given as a file,
for models that random numbers make no sense to.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.given import given_feeds
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs, parse_shape, random_feeds
from rsi_deploy.runtime.feeds.values import described, is_text

PROBE_BATCH = 2

Feeds = dict[str, npt.NDArray[Any]]


def probe_feeds(
    model: Path,
    seed: int,
    shapes: Mapping[str, Sequence[int]] | None = None,
    given: Mapping[str, npt.NDArray[Any]] | None = None,
    examples: Mapping[str, Sequence[int]] | None = None,
    specs: Sequence[InputSpec] | None = None,
) -> Feeds:
    """Inputs for the model at `model`.

    Args:
        model: an ONNX file.
        seed: of the random numbers.
        shapes: input name -> whole shape, where dimensions after the first are dynamic, or as a report has them of all
            inputs; they are taken as they are, whatever their first sizes.
        given: input name -> array, in place of random inputs.
        examples: input name -> shape with a batch of any size, for inputs that `shapes` does not name.
        specs: the model's inputs, where they are known already.

    Raises:
        UsageError: shapes or arrays that do not fit the model, or dynamic dimensions nobody gave.
    """
    specs = model_inputs(model) if specs is None else specs
    if given is not None:
        feeds = given_feeds(specs, given, model.name)
        for name, shape in (shapes or {}).items():
            if name in feeds and feeds[name].shape != tuple(shape):
                raise UsageError(
                    f"--feeds and --input-shape contradict each other: {name} is {feeds[name].shape} in --feeds, but "
                    f"{tuple(shape)} in --input-shape; leave out one of them"
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


def read_feeds(path: str | Path) -> Feeds:
    """Arrays by input name from an `.npz` file.

    Raises:
        UsageError: no such file, or no arrays in it.
    """
    try:
        return read_npz(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--feeds {path}: expected an .npz with one array per model input ({error})") from error


def feeds_fingerprint(feeds: Feeds) -> str:
    """The sha256 (hex) of names, types, shapes and values; of texts, whatever width their array has."""
    digest = hashlib.sha256()
    for name, array in sorted(feeds.items()):
        digest.update(f"{name}\0{described(array)}\0".encode())
        texts = is_text(array.dtype)
        digest.update("\0".join(map(str, array.ravel())).encode() if texts else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def named_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read `NAME=1x128` texts.

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
