"""Unlabelled data for calibration, as batches of a model's inputs.

a data set (see `rsi_deploy.measure.data`)      for a model with one input; labels are not looked at
an .npz with one array per model input  for any model, samples along the first axis of each
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.errors import UsageError
from rsi_deploy.measure.data import Dataset, open_data
from rsi_deploy.measure.inputs import InputSpec
from rsi_deploy.measure.preprocess import Preprocessing

Array = npt.NDArray[Any]

BATCH = 32


class CalibrationData:
    """Samples for one model, `size` of them at most, evenly spaced over the data.

    Args:
        source: a path, an opened data set, or input name -> array `(N, ...)`.
        specs: the model's inputs.
        preprocessing: from 8-bit pictures to inputs.
        size: at most so many samples.

    Attributes:
        available: how many samples there are.
        samples: how many of them are used; whole batches, where the model fixes its batch.
        batch: how many go through the model at a time.

    Raises:
        UsageError: data that do not fit the model, or too few for a model of a fixed batch.
    """

    def __init__(
        self,
        source: str | Path | Dataset | Mapping[str, Array],
        specs: Sequence[InputSpec],
        preprocessing: Preprocessing | None,
        size: int,
    ) -> None:
        self._specs = list(specs)
        self._steps = preprocessing
        arrays = source if isinstance(source, Mapping) else _named_arrays(source, [spec.name for spec in specs])
        if arrays is None and len(self._specs) != 1:
            names = ", ".join(spec.name for spec in self._specs)
            raise UsageError(f"--calib: the model has the inputs {names}; give an .npz with one array for each of them")
        fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
        self.batch = fixed.pop() if len(fixed) == 1 else BATCH
        self._dataset: Dataset | None = None
        self._arrays: dict[str, Array] | None = None
        if arrays is None:
            assert not isinstance(source, Mapping)
            self._dataset = _opened(source) if isinstance(source, str | Path) else source
            self.available = len(self._dataset)
        else:
            self._arrays = _fitting(arrays, self._specs)
            self.available = len(next(iter(self._arrays.values())))
        self.samples = min(size, self.available)
        if any(spec.shape and isinstance(spec.shape[0], int) for spec in specs):
            self.samples -= self.samples % self.batch
        if self.samples < 1:
            raise UsageError(
                f"--calib: {min(size, self.available)} samples are fewer than the model's fixed batch of {self.batch}; "
                f"give more"
            )

    def feeds(self) -> Iterator[dict[str, Array]]:
        """The batches, from the start."""
        if self._arrays is not None:
            count = len(next(iter(self._arrays.values())))
            rows = np.arange(self.samples) * count // self.samples
            for start in range(0, self.samples, self.batch):
                at = rows[start : start + self.batch]
                yield {name: array[at] for name, array in self._arrays.items()}
            return
        assert self._dataset is not None
        spec = self._specs[0]
        steps = self._steps if self._dataset.kind == "images" else None
        for values, _ in self._dataset.batches(self.batch, steps, self.samples):
            yield {spec.name: _as_input(values, spec)}

    def digests(self, limit: int = 4096) -> set[bytes]:
        """A hash of each sample of the first input, as it enters the model."""
        found: set[bytes] = set()
        for feeds in self.feeds():
            found |= {sample_digest(sample) for sample in feeds[self._specs[0].name]}
            if len(found) >= limit:
                break
        return found


def check_source(source: object) -> None:
    """Refuse, before any work, a path with no data at it.

    Raises:
        UsageError: says what was expected.
    """
    if isinstance(source, str | Path) and not Path(source).exists():
        raise UsageError(
            f"--calib: {source} does not exist; expected an .npz (images, x, or one array for each input) or a folder "
            f"of pictures in class folders"
        )


def sample_digest(sample: Array) -> bytes:
    """A hash of one sample's values."""
    return hashlib.sha256(np.ascontiguousarray(sample).tobytes()).digest()


def refuse_shared(
    calibration: CalibrationData, evaluation: Dataset, spec: InputSpec, steps: Preprocessing | None
) -> None:
    """Refuse calibration data that hold evaluation samples: what is tuned on them is not measured by them.

    Raises:
        UsageError: with how many of the evaluation samples are shared.
    """
    known = calibration.digests()
    applied = steps if evaluation.kind == "images" else None
    seen = shared = 0
    for values, _ in evaluation.batches(64, applied, min(len(evaluation), 2048)):
        inputs = _as_input(values, spec, option="--data")
        seen += len(inputs)
        shared += sum(sample_digest(sample) in known for sample in inputs)
    if shared:
        raise UsageError(
            f"--calib and --data share samples ({shared} of {seen} evaluation samples looked at): the accuracy would "
            f"be measured on what the factors were fitted to; give other data, or add --allow-shared-data"
        )


def _named_arrays(source: str | Path | Dataset, names: Sequence[str]) -> dict[str, Array] | None:
    """The arrays of an .npz whose keys are the model's inputs; None where it is another kind of data."""
    if not isinstance(source, str | Path) or not zipfile.is_zipfile(source):
        return None
    if list(names) in (["images"], ["x"]):  # also the keys of a data set, whose pictures go through a preprocessing
        return None
    try:
        with np.load(source, allow_pickle=False) as file:
            if not set(names) <= set(file.files):
                return None
            return {name: file[name] for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"--calib: {source} cannot be read: {error}") from error


def _opened(path: str | Path) -> Dataset:
    try:
        return open_data(path)
    except UsageError as error:
        raise UsageError(f"--calib: {str(error).removeprefix('data: ')}") from error


def _fitting(arrays: Mapping[str, Array], specs: Sequence[InputSpec]) -> dict[str, Array]:
    if absent := [spec.name for spec in specs if spec.name not in arrays]:
        raise UsageError(f"--calib: no array for the input {', '.join(absent)}; there are {', '.join(arrays)}")
    counts = {spec.name: len(arrays[spec.name]) if arrays[spec.name].ndim else 0 for spec in specs}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise UsageError(f"--calib: every input needs as many samples as the others, but got {counts}")
    return {spec.name: _as_input(arrays[spec.name], spec) for spec in specs}


def _as_input(values: Array, spec: InputSpec, *, option: str = "--calib") -> Array:
    """The values in the input's dtype and checked against its shape."""
    came = f"{values.dtype} ({', '.join(map(str, ['samples', *values.shape[1:]]))})"
    kinds = {values.dtype.kind, spec.dtype.kind}
    if values.dtype != spec.dtype and not (kinds <= {"f"} or kinds <= {"i", "u", "b"}):
        raise UsageError(
            f"{option}: the model takes {spec}, but the data are {came}; 8-bit pictures need a "
            f"preprocessing (--mean, --std, ...), ready inputs the model's own type"
        )
    fits = values.ndim == len(spec.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape[1:], values.shape[1:], strict=True)
    )
    if not fits:
        raise UsageError(f"{option}: the model takes {spec}, but the data are {came}")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise UsageError(f"{option}: the data for {spec.name} hold NaN; take those samples out")
    return np.ascontiguousarray(values.astype(spec.dtype, copy=False))
