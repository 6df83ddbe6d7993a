"""The outputs of a model for any number of samples.

A model with a fixed batch runs on batches of that size; copies of the last sample fill up the last batch, and their
answers are dropped. Kept are outputs with one row per sample that are floating or class ids. Class ids from an ArgMax
or TopK come first, unless their scores are an output too. A sequence of maps from classes to scores, as ZipMap makes
them, counts as scores `(n, classes)`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.greedy import greedy_tokens
from rsi_deploy.evaluation.zipmap_columns import ColumnClasses, zipmap_columns
from rsi_deploy.runtime import providers
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import arrays_of_output
from rsi_deploy.runtime.placement import proven_placement
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from rsi_deploy.evaluation.answer_outputs import ClassIds


class Predictor:
    """A session that returns the answers of a model.

    Attributes:
        name: file of the model.
        provider: full name of the provider that runs it.
        specs: inputs of the model.
        batch: fixed batch size, or None.
        ids: output that comes from an ArgMax or TopK, or None.
    """

    def __init__(self, model: str | Path, provider: str):
        self.name, self._requested = str(model), provider
        self._session = make_session(model, provider)
        self.provider: str = self._session.get_providers()[0]
        self.specs: list[InputSpec] = model_inputs(self._session, self.name)
        self._names = [output.name for output in self._session.get_outputs()]
        self.axes = BatchAxes.of({spec.name: spec.shape for spec in self.specs})
        self.batch: int | None = self.axes.fixed
        self._output_axes = self._batch_axes_of_outputs()
        self.ids = _class_ids(self._session, Path(model))
        self._columns = zipmap_columns(Path(model), self._session)

    def stored_preprocessing(self) -> Preprocessing | None:
        """Return the preprocessing in the model's metadata."""
        return Preprocessing.stored(self._session.get_modelmeta().custom_metadata_map)

    def outputs(self, feeds: Feeds) -> dict[str, Array]:
        """Return class ids, if any, and floating outputs `(n, ...)` by name, for feeds of `n` samples.

        Raises:
            ModelError: The run fails, or there is no such output.
        """
        count = self.axes.samples(feeds)
        runs = [self._run(chunk) for chunk in self._chunks(feeds)]
        names = [
            name for name in runs[0] if all(name in run for run in runs)
        ]  # a sequence may have more elements in one run
        found = {
            name: (np.concatenate([run[name] for run in runs]) if len(runs) > 1 else runs[0][name])[:count]
            for name in names
        }
        if not found:
            gives = ", ".join(f"{output.name}: {output.type}" for output in self._session.get_outputs())
            raise ModelError(
                f"{self.name}: no output has floating numbers with one row per sample, or class ids; it returns "
                f"{gives}",
                hint="give a model that has one",
            )
        return found

    def greedy(self, prompts: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64] | None:
        """Return the tokens that a decoder generates after prompts `(n, tokens)`; None if it takes no caches."""
        caches = Caches.of(self.specs)
        if caches is None or caches.presents(self._names) is None or self.batch is not None:
            return None
        return greedy_tokens(self._session, prompts, steps, self.name)

    @property
    def has_logits(self) -> bool:
        """Whether the first floating output has three axes, as the scores `(n, t, vocabulary)` of a decoder."""
        found = (o.shape for o in self._session.get_outputs() if o.type in ("tensor(float)", "tensor(float16)"))
        return len(next(found, None) or ()) == 3

    @property
    def column_classes(self) -> ColumnClasses | None:
        """Classes of the columns of the class scores if they come from a ZipMap, which leaves no tensor of scores."""
        floating = ("tensor(float", "tensor(double", "seq(map(")
        first = next((o.name for o in self._session.get_outputs() if o.type.startswith(floating)), "")
        return self._columns.get(first)

    def prove_provider(self, feeds: Feeds) -> None:
        """Raise if the provider runs nothing. The CPU provider is not checked, as others fall back to it."""
        if providers.short_name(self.provider) != "cpu":
            proven_placement(self.name, self._requested, next(self._chunks(feeds)))

    def _chunks(self, feeds: Feeds) -> Iterator[Feeds]:
        """Yield feeds of the model's fixed batch size; copies of the last sample fill up the last one."""
        count = self.axes.samples(feeds)
        size = self.batch or count
        for start in range(0, count, size):
            yield self.axes.cut(feeds, np.minimum(np.arange(start, start + size), count - 1))

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        count = self.axes.samples(feeds)
        outputs = run_session(self._session, feeds, self.name)
        named: dict[str, Array] = {}
        for name, value in zip(self._names, outputs, strict=True):
            named |= arrays_of_output(name, value, self._columns.get(name))
        for name, axis in self._output_axes.items():
            if name in named and axis < named[name].ndim:
                named[name] = np.moveaxis(named[name], axis, 0)
        return answer_rows(named, count, self.ids)

    def _batch_axes_of_outputs(self) -> dict[str, int]:
        """Return the batch axis of each output whose batch is not first, found by the name of the inputs' batch."""
        specs = {spec.name: spec for spec in self.specs}
        symbols = {specs[name].shape[axis] for name, axis in self.axes.axes.items() if axis is not None}
        names = [symbol for symbol in symbols if isinstance(symbol, str)]
        found: dict[str, int] = {}
        for output in self._session.get_outputs():
            axis = next((at for at, dim in enumerate(output.shape or ()) if dim in names), 0)
            found |= {output.name: axis} if axis else {}
        return found


def floating_rows(outputs: Feeds, count: int) -> dict[str, Array]:
    """Return the outputs that are floating and have one row of numbers for each of `count` samples."""
    return {
        name: array
        for name, array in outputs.items()
        if array.dtype.kind == "f" and array.ndim and len(array) == count and array.size
    }


def answer_rows(outputs: Feeds, count: int, ids: "ClassIds | None") -> dict[str, Array]:
    """Return the outputs to compare, answers first: scores, or class ids if there are none; then other floats.

    Args:
        outputs: outputs for `count` samples.
        count: number of samples.
        ids: output of an ArgMax or TopK; if None, an output of one integer per sample comes last.
    """
    found = floating_rows(outputs, count)
    if ids is not None and ids.scores in found:
        return {ids.scores: found[ids.scores], **found}
    whole = {n: a for n, a in outputs.items() if a.dtype.kind in "iub" and a.ndim and len(a) == count and a.size}
    if ids is not None and ids.output in whole:
        return {ids.output: whole[ids.output], **found}
    single = {name: array for name, array in whole.items() if not found or array.size == count}
    return {**found, **dict(list(single.items())[:1])}


def _class_ids(session: "InferenceSession", model: Path) -> "ClassIds | None":
    """Return the output of class ids of a model, if any; None for a file in onnxruntime's own format."""
    if model.suffix == ".ort" or not any("int" in output.type for output in session.get_outputs()):
        return None
    from rsi_deploy.evaluation.answer_outputs import class_ids
    from rsi_deploy.io.onnx_reader import read_proto

    return class_ids(read_proto(model))
