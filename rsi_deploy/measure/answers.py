"""A model's outputs for any number of samples, whatever batch it takes.

A model whose batch is fixed gets that one, the last filled up with copies of its last sample, whose answers are
dropped. Outputs that are no floating numbers, or that have no row for each sample, are left out. A sequence of maps
from classes to scores, as ZipMap makes them, counts as the scores `(n, classes)`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rsi_deploy.errors import ModelError
from rsi_deploy.measure import providers
from rsi_deploy.measure.class_ids import ClassIds, class_ids
from rsi_deploy.measure.dataset import Array
from rsi_deploy.measure.feeding import Feeds
from rsi_deploy.measure.inputs import InputSpec, model_inputs
from rsi_deploy.measure.placement import proven_placement
from rsi_deploy.measure.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.measure.sessions import make_session, run_session
from rsi_deploy.measure.values import arrays_of


class Answers:
    """A session, and its answers to samples.

    Attributes:
        name: the model's file.
        provider: full name of the one that runs it.
        specs: its inputs.
        batch: the batch it fixes, or None.
    """

    def __init__(self, model: str | Path, provider: str):
        self.name, self._asked = str(model), provider
        self._session = make_session(model, provider)
        self.provider: str = self._session.get_providers()[0]
        self.specs: list[InputSpec] = model_inputs(self._session, self.name)
        self._names = [output.name for output in self._session.get_outputs()]
        self._class_ids = class_ids(Path(model), self._session)
        fixed = [spec.shape[0] for spec in self.specs if spec.shape and isinstance(spec.shape[0], int)]
        self.batch: int | None = fixed[0] if fixed else None

    def stored_preprocessing(self) -> Preprocessing | None:
        """What the model's metadata carry."""
        stored = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        return None if stored is None else Preprocessing.from_metadata(stored)

    def outputs(self, feeds: Feeds) -> dict[str, Array]:
        """Floating outputs `(n, ...)` of feeds of `n` samples, by name.

        Raises:
            ModelError: the run fails, or there is no such output.
        """
        count = len(next(iter(feeds.values())))
        runs = [self._run(chunk) for chunk in self._chunks(feeds)]
        names = [name for name in runs[0] if all(name in run for run in runs)]  # a sequence may be longer in one run
        found = {name: np.concatenate([run[name] for run in runs])[:count] for name in names}
        if not found:
            raise ModelError(
                f"{self.name}: no output holds floating numbers with one row for each sample; give a model that has one"
            )
        return found

    @property
    def class_ids(self) -> ClassIds | None:
        """What the columns of the class scores stand for, where they are a ZipMap's: then no tensor is before them."""
        floating = ("tensor(float", "tensor(double", "seq(map(")
        first = next((o.name for o in self._session.get_outputs() if o.type.startswith(floating)), "")
        return self._class_ids.get(first)

    def prove_provider(self, feeds: Feeds) -> None:
        """Refuse a provider that runs nothing; the CPU one needs no proof, everything else falls back to it."""
        if providers.short_name(self.provider) != "cpu":
            proven_placement(self.name, self._asked, next(self._chunks(feeds)))

    def _chunks(self, feeds: Feeds) -> Iterator[Feeds]:
        """Runs of the model's fixed batch, the last filled up with copies of its last sample."""
        count = len(next(iter(feeds.values())))
        size = self.batch or count
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            yield {name: array[rows] for name, array in feeds.items()}

    def _run(self, feeds: Feeds) -> dict[str, Array]:
        count = len(next(iter(feeds.values())))
        outputs = run_session(self._session, feeds, self.name)
        arrays: dict[str, Array] = {}
        for name, value in zip(self._names, outputs, strict=True):
            arrays |= arrays_of(name, value, self._class_ids.get(name))
        return floating_rows(arrays, count)


def floating_rows(outputs: Mapping[str, Array], count: int) -> dict[str, Array]:
    """The outputs that are compared: floating, with one row for each of `count` samples."""
    return {
        name: array for name, array in outputs.items() if array.dtype.kind == "f" and array.ndim and len(array) == count
    }
