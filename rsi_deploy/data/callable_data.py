"""Samples from a Python function, `package.module:function`. Its code runs, so only the user may name it.

The function is called without arguments and returns

    an iterable of batches     `(inputs, labels)`, `(inputs, None)` or `inputs`; inputs are an array `(n, ...)` or a
                               mapping of model input to array, labels are class numbers `(n,)`; tensors are accepted,
                               and a number for an input without a batch axis
    a `Dataset`                an object with `batches`, `labels` and `fingerprint` (see `rsi_deploy.data.dataset`)

It is called once to count, check and hash the samples, and again for every pass. So the data need not fit into memory,
but must come in the same order each time.
"""

import difflib
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.dataset import (
    Batch,
    Dataset,
    Inputs,
    Kind,
    Labels,
    Steps,
    checked_columns,
    checked_labels,
    classify_samples,
    rebatch,
    row_batches,
    row_count,
    select_rows,
    spaced_rows,
)

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_callable_spec(text: str) -> bool:
    """Return whether a text has the form `package.module:function` and is not a path.

    Example:
        >>> is_callable_spec("my_data.digits:batches"), is_callable_spec("data.npz")
        (True, False)
    """
    return _SPEC.fullmatch(text) is not None and not Path(text).exists()


def callable_data(spec: str) -> Dataset:
    """Open the data of `package.module:function`.

    Raises:
        UsageError: The function does not exist, fails, or returns no samples.
    """
    function = _imported(spec)
    found = _called(function, spec)
    if all(hasattr(found, name) for name in ("batches", "labels", "fingerprint")):
        dataset: Dataset = found
        return dataset
    return CallableData(function, spec)


class CallableData:
    """Batches that a function returns anew at every call."""

    classes: tuple[str, ...] = ()
    default = ""

    def __init__(self, function: Callable[[], Any], name: str):
        self._function, self._name = function, name
        digest = hashlib.sha256()
        labels: list[Array] = []
        first: Inputs | None = None
        self._samples = unlabelled = 0
        for inputs, own in self._checked_batches():
            first = inputs if first is None else first
            if _names(inputs) != _names(first):
                raise UsageError(
                    f"data: {name} gives {_names(first)} in its first batch and {_names(inputs)} in a later one",
                    hint="give the same inputs in every batch",
                )
            self._samples += row_count(inputs)
            unlabelled += row_count(inputs) if own is None else 0
            labels += [] if own is None else [own]
            _feed(digest, inputs, own)
        if first is None:
            raise UsageError(f"data: {name} gives no batches", hint="it must return an iterable of (inputs, labels)")
        if labels and unlabelled:
            raise UsageError(
                f"data: {name} gives labels with some batches and none with {unlabelled} samples",
                hint="give labels with every batch, or with none",
            )
        self.labels: Labels | None = np.concatenate(labels) if labels else None
        self.columns: tuple[str, ...] = tuple(first) if isinstance(first, Mapping) else ()
        self.kind: Kind = "named" if isinstance(first, Mapping) else classify_samples(first, name)[0]
        self._input_names = _names(first)
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._samples

    def select(self, names: Sequence[str]) -> "CallableData":
        """See `Dataset.select`."""
        chosen = object.__new__(CallableData)
        chosen.__dict__.update(self.__dict__, columns=checked_columns(names, self.columns, self._name))
        return chosen

    def fingerprint(self) -> str:
        """Return the sha256 of all samples and labels, independent of the batch size."""
        return self._fingerprint

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`.

        Raises:
            UsageError: The samples differ from those of the first call.
        """
        chosen = spaced_rows(len(self), batch_size, limit)
        steps = preprocessing if self.kind == "images" else None
        for inputs, rows in zip(
            rebatch(self._pieces(chosen, steps), batch_size), row_batches(len(self), batch_size, limit), strict=True
        ):
            yield inputs, None if self.labels is None else self.labels[rows]

    def _pieces(self, chosen: Labels, steps: Steps | None) -> Iterator[Inputs]:
        """Yield the chosen rows of each batch."""
        start = 0
        for inputs, labels in self._checked_batches():
            count = row_count(inputs)
            known = np.empty(0) if self.labels is None else self.labels[start : start + count]
            is_other = labels is not None and not np.array_equal(labels, known)
            if is_other or start + count > len(self) or _names(inputs) != self._input_names:
                self._refuse_change()
            rows = chosen[(chosen >= start) & (chosen < start + count)] - start
            start += count
            if len(rows):
                piece = select_rows(inputs, rows)
                if isinstance(piece, Mapping):
                    yield {name: piece[name] for name in self.columns}
                else:
                    yield piece if steps is None else steps.apply(classify_samples(piece, self._name)[1])
        if start != len(self):
            self._refuse_change()

    def _refuse_change(self) -> None:
        raise UsageError(
            f"data: {self._name} returns different samples at every call",
            hint="it must return the same ones in the same order (no shuffling, a fixed seed)",
        )

    def _checked_batches(self) -> Iterator[tuple[Inputs, Labels | None]]:
        """Yield the function's batches after checking them."""
        found = _called(self._function, self._name)
        if isinstance(found, tuple):  # all samples at once
            found = [found]
        if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping):
            raise UsageError(
                f"data: {self._name} must return an iterable of (inputs, labels), but returned {type(found).__name__}"
            )
        iterator = iter(found)
        while True:
            try:
                batch = next(iterator, None)
            except Exception as error:  # the user's code can raise anything
                raise UsageError(
                    f"data: {self._name} failed: {type(error).__name__}: {error}", hint="repair the function"
                ) from error
            if batch is None:
                return
            yield self._checked(batch)

    def _checked(self, batch: Any) -> tuple[Inputs, Labels | None]:
        pair = isinstance(batch, tuple | list)
        if pair and len(batch) != 2:
            raise UsageError(f"data: {self._name} must return (inputs, labels), but a batch has {len(batch)} elements")
        values, labels = batch if pair else (batch, None)
        inputs: Inputs
        if isinstance(values, Mapping):
            inputs = {str(key): _array(value) for key, value in values.items()}
            counts = {key: len(array) for key, array in inputs.items() if array.ndim}
            if len(set(counts.values())) != 1 or not min(counts.values()):
                raise UsageError(
                    f"data: {self._name}: all inputs of a batch must have the same number of samples, but got {counts}",
                    hint="give an input without a batch axis as one number, or once for each sample",
                )
            samples = next(iter(counts.values()))
            inputs = {key: array if array.ndim else np.full(samples, array) for key, array in inputs.items()}
        else:
            inputs = classify_samples(_array(values), self._name)[1]
        own = None if labels is None else checked_labels(_array(labels), row_count(inputs), f"{self._name}, a batch")
        return inputs, own


def _names(inputs: Inputs) -> str:
    """Describe the inputs of a batch; the order of its arrays does not matter."""
    return ", ".join(sorted(inputs)) if isinstance(inputs, Mapping) else "one array without a name"


def _array(value: Any) -> Array:
    """Convert a value, or a tensor of any framework, to an array."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"data: a batch holds {type(value).__name__}, which is not an array: {error}",
            hint="give numpy arrays or tensors",
        ) from error


def _feed(digest: Any, inputs: Inputs, labels: Labels | None) -> None:
    """Hash samples one by one, so that the batch size does not matter."""
    named = sorted(inputs.items()) if isinstance(inputs, Mapping) else [("", inputs)]
    for row in range(row_count(inputs)):
        for name, array in named:
            digest.update(f"{name}{array.dtype.str}{array.shape[1:]}".encode() + array[row].tobytes())
        if labels is not None:
            digest.update(labels[row].tobytes())


def _called(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:  # the user's code can raise anything
        raise UsageError(f"data: {name} failed: {type(error).__name__}: {error}", hint="repair the function") from error


def _imported(spec: str) -> Callable[[], Any]:
    module_name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"data: cannot import {module_name!r} of {spec}: {error}",
            hint="data are a path, or package.module:function",
        ) from error
    except Exception as error:  # importing runs the user's code
        raise UsageError(
            f"data: importing {module_name!r} failed: {type(error).__name__}: {error}", hint="repair the module"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=3, cutoff=0.4)
        raise UsageError(
            f"data: {module_name} has no function {attribute!r}"
            + (f"; similar names: {', '.join(near)}" * bool(near))
            + "; type one that exists"
        )
    found: Callable[[], Any] = function
    return found
