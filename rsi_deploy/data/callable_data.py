"""Samples from Python: `package.module:function`, whose code runs and which only the user names.

The function is called without arguments and returns

    an iterable of batches     `(inputs, labels)`, `(inputs, None)` or `inputs`; inputs are an array `(n, ...)` or a
                               mapping of model input to array, labels class numbers `(n,)`; tensors are taken too,
                               and a number for an input that has no batch axis
    a `Dataset`                anything with `batches`, `labels` and `fingerprint` (see `rsi_deploy.data.dataset`)

It is called once to count, check and hash the samples, and again for every pass: data need not fit into memory, and
must come in the same order each time.
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
from rsi_deploy.data.dataset import (
    Array,
    Batch,
    Dataset,
    Inputs,
    Kind,
    Labels,
    Steps,
    as_samples,
    checked_columns,
    checked_labels,
    cut,
    regrouped,
    row_batches,
    row_count,
    spaced_rows,
)

_SPEC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_callable_spec(text: str) -> bool:
    """Whether a text is spelled `package.module:function` and is no path.

    Example:
        >>> is_callable_spec("my_data.digits:batches"), is_callable_spec("data.npz")
        (True, False)
    """
    return _SPEC.fullmatch(text) is not None and not Path(text).exists()


def callable_data(spec: str) -> Dataset:
    """The data of `package.module:function`.

    Raises:
        UsageError: no such function, it fails, or it gives no samples.
    """
    function = _imported(spec)
    found = _called(function, spec)
    if all(hasattr(found, name) for name in ("batches", "labels", "fingerprint")):
        dataset: Dataset = found
        return dataset
    return CallableData(function, spec)


class CallableData:
    """Batches that a function gives anew at every call."""

    classes: tuple[str, ...] = ()
    default = ""

    def __init__(self, function: Callable[[], Any], name: str):
        self._function, self._name = function, name
        digest = hashlib.sha256()
        labels: list[Array] = []
        first: Inputs | None = None
        self._samples = unlabelled = 0
        for inputs, own in self._given():
            first = inputs if first is None else first
            if _names(inputs) != _names(first):
                raise UsageError(
                    f"data: {name} gives {_names(first)} in its first batch and {_names(inputs)} in a later one"
                    f"; give the same inputs in every batch"
                )
            self._samples += row_count(inputs)
            unlabelled += row_count(inputs) if own is None else 0
            labels += [] if own is None else [own]
            _feed(digest, inputs, own)
        if first is None:
            raise UsageError(f"data: {name} gives no batches; it must return an iterable of (inputs, labels)")
        if labels and unlabelled:
            raise UsageError(
                f"data: {name} gives labels with some batches and none with {unlabelled} samples"
                f"; give labels with every batch, or with none"
            )
        self.labels: Labels | None = np.concatenate(labels) if labels else None
        self.columns: tuple[str, ...] = tuple(first) if isinstance(first, Mapping) else ()
        self.kind: Kind = "named" if isinstance(first, Mapping) else as_samples(first, name)[0]
        self._given_names = _names(first)
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._samples

    def select(self, names: Sequence[str]) -> "CallableData":
        """See `Dataset.select`."""
        chosen = object.__new__(CallableData)
        chosen.__dict__.update(self.__dict__, columns=checked_columns(names, self.columns, self._name))
        return chosen

    def fingerprint(self) -> str:
        """The sha256 of all samples and labels, whatever the size of the batches."""
        return self._fingerprint

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`.

        Raises:
            UsageError: the function gives other samples than it did when they were counted.
        """
        wanted = spaced_rows(len(self), batch_size, limit)
        steps = preprocessing if self.kind == "images" else None
        for inputs, rows in zip(
            regrouped(self._pieces(wanted, steps), batch_size), row_batches(len(self), batch_size, limit), strict=True
        ):
            yield inputs, None if self.labels is None else self.labels[rows]

    def _pieces(self, wanted: Labels, steps: Steps | None) -> Iterator[Inputs]:
        """The wanted rows of each batch."""
        start = 0
        for inputs, labels in self._given():
            count = row_count(inputs)
            known = np.empty(0) if self.labels is None else self.labels[start : start + count]
            is_other = labels is not None and not np.array_equal(labels, known)
            if is_other or start + count > len(self) or _names(inputs) != self._given_names:
                self._refuse_change()
            rows = wanted[(wanted >= start) & (wanted < start + count)] - start
            start += count
            if len(rows):
                piece = cut(inputs, rows)
                if isinstance(piece, Mapping):
                    yield {name: piece[name] for name in self.columns}
                else:
                    yield piece if steps is None else steps.apply(as_samples(piece, self._name)[1])
        if start != len(self):
            self._refuse_change()

    def _refuse_change(self) -> None:
        raise UsageError(
            f"data: {self._name} gives other samples at every call; it must give the same ones in the same order "
            f"(no shuffling, a fixed seed)"
        )

    def _given(self) -> Iterator[tuple[Inputs, Labels | None]]:
        """The function's batches, checked."""
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
            except Exception as error:  # the user's own code
                raise UsageError(
                    f"data: {self._name} failed: {type(error).__name__}: {error}; repair the function"
                ) from error
            if batch is None:
                return
            yield self._checked(batch)

    def _checked(self, batch: Any) -> tuple[Inputs, Labels | None]:
        pair = isinstance(batch, tuple | list)
        if pair and len(batch) != 2:
            raise UsageError(f"data: {self._name} must give (inputs, labels), but gave {len(batch)} things in a batch")
        given, labels = batch if pair else (batch, None)
        inputs: Inputs
        if isinstance(given, Mapping):
            inputs = {str(key): _array(value) for key, value in given.items()}
            counts = {key: len(array) for key, array in inputs.items() if array.ndim}
            if len(set(counts.values())) != 1 or not min(counts.values()):
                raise UsageError(
                    f"data: {self._name}: every input of a batch needs as many samples as the others, but got {counts}"
                    f"; an input without a batch axis is given as one number, or once for each sample"
                )
            samples = next(iter(counts.values()))
            inputs = {key: array if array.ndim else np.full(samples, array) for key, array in inputs.items()}
        else:
            inputs = as_samples(_array(given), self._name)[1]
        own = None if labels is None else checked_labels(_array(labels), row_count(inputs), f"{self._name}, a batch")
        return inputs, own


def _names(inputs: Inputs) -> str:
    """What a batch holds, in words; the order of its arrays does not matter."""
    return ", ".join(sorted(inputs)) if isinstance(inputs, Mapping) else "one array without a name"


def _array(value: Any) -> Array:
    """An array, from a tensor of any framework too."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"data: a batch holds {type(value).__name__}, which is no array: {error}; give numpy arrays or tensors"
        ) from error


def _feed(digest: Any, inputs: Inputs, labels: Labels | None) -> None:
    """Hash sample by sample, so that the size of the batches does not matter."""
    named = sorted(inputs.items()) if isinstance(inputs, Mapping) else [("", inputs)]
    for row in range(row_count(inputs)):
        for name, array in named:
            digest.update(f"{name}{array.dtype.str}{array.shape[1:]}".encode() + array[row].tobytes())
        if labels is not None:
            digest.update(labels[row].tobytes())


def _called(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:  # the user's own code: whatever it raises is reported as theirs
        raise UsageError(f"data: {name} failed: {type(error).__name__}: {error}; repair the function") from error


def _imported(spec: str) -> Callable[[], Any]:
    module_name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"data: cannot import {module_name!r} of {spec}: {error}; data are a path, or package.module:function"
        ) from error
    except Exception as error:  # the user's own code runs on import
        raise UsageError(
            f"data: importing {module_name!r} failed: {type(error).__name__}: {error}; repair the module"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=3, cutoff=0.4)
        raise UsageError(
            f"data: {module_name} has no function {attribute!r}"
            + (f"; near names: {', '.join(near)}" * bool(near))
            + "; type one that is there"
        )
    found: Callable[[], Any] = function
    return found
