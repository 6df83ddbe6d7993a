"""Seeded random inputs for a model.

Every input has its own generator, seeded by (seed, input name), so that its values do not depend on the other inputs.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array, Shape
from rsi_deploy.io.limits import GENERATED_NUMBERS, quoted_name
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import InputSpec
from rsi_deploy.runtime.feeds.shapes import concrete_shapes
from rsi_deploy.runtime.feeds.values import is_text


def random_feeds(
    specs: Sequence[InputSpec],
    batch: int,
    seed: int,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    *,
    shapes_settle_batch: bool = False,
) -> dict[str, Array]:
    """Draw inputs: standard normal floats, integers 0 or 1 (valid indices of any table), random booleans.

    Integer inputs whose name contains "mask" are all ones, so that nothing is masked. A decoder with caches gets a few
    tokens after an empty past where `input_shape` says nothing else (see `rsi_deploy.runtime.feeds.caches`).

    Args:
        specs: inputs of the model.
        batch: size of every dynamic batch axis.
        seed: random seed, 0 or more.
        input_shape: input name -> its whole shape with the batch; needed where another dimension is dynamic.
        shapes_settle_batch: whether batch sizes in `input_shape` may differ from `batch`.

    Returns:
        Input name -> array of the input's dtype.

    Raises:
        UsageError: `input_shape` has an unknown name or a shape that does not fit, a dynamic dimension has no size, or
            no input can have this batch size.
    """
    known, caches = dict(input_shape or {}), Caches.of(specs)
    if caches is not None:
        known = caches.shapes(batch, known) | known
    shapes = concrete_shapes(specs, batch, known, shapes_settle_batch=shapes_settle_batch)
    found = {spec.name: _draw(spec, shapes[spec.name], seed) for spec in specs}
    return found if caches is None else {**found, **caches.places(shapes)}


def _draw(spec: InputSpec, shape: Shape, seed: int) -> Array:
    if math.prod(shape) > GENERATED_NUMBERS:
        raise UsageError(
            f"input {quoted_name(spec.name)} of shape {shape} has more than {GENERATED_NUMBERS} numbers",
            hint="give a smaller shape or batch",
        )
    if is_text(spec.dtype):
        raise UsageError(
            f"input {spec} takes text, which is not drawn at random", hint="give it in an .npz file: --feeds FILE.npz"
        )
    rng = np.random.default_rng([seed, *spec.name.encode()])
    if spec.dtype.kind in "iu":
        values = np.ones(shape) if "mask" in spec.name.lower() else rng.integers(0, 2, shape)
    elif spec.dtype.kind == "b":
        values = rng.integers(0, 2, shape)
    else:
        values = rng.standard_normal(shape)
    return np.asarray(values).astype(spec.dtype)
