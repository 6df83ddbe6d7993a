"""A model's outputs for any number of samples, whatever batch it takes.

A model whose batch is fixed gets that one, the last filled up with copies of its last sample, whose answers are
dropped. Outputs that have no row for each sample are left out, and so are those of whole numbers, but for class ids:
those that an ArgMax or a TopK makes come first, unless the scores are an output too. A sequence of maps from classes to
scores, as ZipMap makes them, counts as the scores `(n, classes)`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rsi_deploy.core.errors import ModelError
from rsi_deploy.data.dataset import Array
from rsi_deploy.data.feeding import Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.zipmap_columns import ColumnClasses, zipmap_columns
from rsi_deploy.runtime import providers
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import arrays_of_output
from rsi_deploy.runtime.placement import proven_placement
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from rsi_deploy.evaluation.answer_outputs import ClassIds


class Answers:
    """A session, and its answers to samples.

    Attributes:
        name: the model's file.
        provider: full name of the one that runs it.
        specs: its inputs.
        batch: the batch it fixes, or None.
        ids: the output that comes from an ArgMax or a TopK; None without one.
    """

    def __init__(self, model: str | Path, provider: str):
        self.name, self._asked = str(model), provider
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
        """What the model's metadata carry."""
        return Preprocessing.stored(self._session.get_modelmeta().custom_metadata_map)

    def outputs(self, feeds: Feeds) -> dict[str, Array]:
        """Class ids, where there are some, and floating outputs `(n, ...)` of feeds of `n` samples, by name.

        Raises:
            ModelError: the run fails, or there is no such output.
        """
        count = self.axes.samples(feeds)
        runs = [self._run(chunk) for chunk in self._chunks(feeds)]
        names = [name for name in runs[0] if all(name in run for run in runs)]  # a sequence may be longer in one run
        found = {name: np.concatenate([run[name] for run in runs])[:count] for name in names}
        if not found:
            gives = ", ".join(f"{output.name}: {output.type}" for output in self._session.get_outputs())
            raise ModelError(
                f"{self.name}: no output holds floating numbers with one row for each sample, or class ids; it gives "
                f"{gives}; give a model that has one"
            )
        return found

    @property
    def column_classes(self) -> ColumnClasses | None:
        """What the columns of the class scores stand for, where they are a ZipMap's: then no tensor is before them."""
        floating = ("tensor(float", "tensor(double", "seq(map(")
        first = next((o.name for o in self._session.get_outputs() if o.type.startswith(floating)), "")
        return self._columns.get(first)

    def prove_provider(self, feeds: Feeds) -> None:
        """Refuse a provider that runs nothing; the CPU one needs no proof, everything else falls back to it."""
        if providers.short_name(self.provider) != "cpu":
            proven_placement(self.name, self._asked, next(self._chunks(feeds)))

    def _chunks(self, feeds: Feeds) -> Iterator[Feeds]:
        """Runs of the model's fixed batch, the last filled up with copies of its last sample."""
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
        """Output name -> its batch axis, where that is not the first: where the name of the inputs' batch stands."""
        specs = {spec.name: spec for spec in self.specs}
        symbols = {specs[name].shape[axis] for name, axis in self.axes.axes.items() if axis is not None}
        names = [symbol for symbol in symbols if isinstance(symbol, str)]
        found: dict[str, int] = {}
        for output in self._session.get_outputs():
            axis = next((at for at, dim in enumerate(output.shape or ()) if dim in names), 0)
            found |= {output.name: axis} if axis else {}
        return found


def floating_rows(outputs: Mapping[str, Array], count: int) -> dict[str, Array]:
    """The outputs that are compared: floating, with one row of numbers for each of `count` samples."""
    return {
        name: array
        for name, array in outputs.items()
        if array.dtype.kind == "f" and array.ndim and len(array) == count and array.size
    }


def answer_rows(outputs: Mapping[str, Array], count: int, ids: "ClassIds | None") -> dict[str, Array]:
    """The outputs that are compared, the answers first: scores, or class ids where there are none; then other floats.

    Args:
        outputs: of `count` samples.
        count: of samples.
        ids: the output of an ArgMax or a TopK; without one a whole number a sample comes last, if there is one.
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
    """What is known of the class ids that a model gives; nothing of a file in onnxruntime's own format."""
    if model.suffix == ".ort" or not any("int" in output.type for output in session.get_outputs()):
        return None
    from rsi_deploy.evaluation.answer_outputs import class_ids
    from rsi_deploy.io.onnx_reader import read_proto

    return class_ids(read_proto(model))
