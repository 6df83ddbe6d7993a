"""Results of an interrupted run, kept on disk so that the next run of the same export continues from them.

    split_model --Task--> StoringExecutor --> stored: read back and checked
                                          --> not stored: computed by another executor, then stored
    Calibrator --fitted factors of all sites--> stored as a whole

Each result has a file of its own, named by a hash of its task: the weights' names, the rank, the solver with its seed.
A folder holds the results of one model, machine and set of versions (`key.txt`); results of another are deleted. A task
is a function of its weights and settings alone, so an export from stored results gives the same bytes. Storing writes
the factors once more; below `LARGE` bytes of weights that is not worth while, and nothing is stored.
"""

import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graph_passes.forms import Form
from rsi_deploy import __version__
from rsi_deploy.calibration.activations import FittedSite, Replacement
from rsi_deploy.core.sites import SiteRecord, Spectrum
from rsi_deploy.execution.executor import Executor, Task
from rsi_deploy.io.atomic import atomic_file, write_text
from rsi_deploy.io.locks import remove
from rsi_deploy.linalg.products.rates import processor, rates
from rsi_deploy.linalg.solver import Factors

LARGE = 64 * 2**20
"""Bytes of a model's weights from which its results are stored."""

PARTS = ("left", "right", "bias")
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, pydantic.ValidationError)
log = logging.getLogger(__name__)


class _Fit(pydantic.BaseModel, extra="forbid"):
    """A site's fitted factors (`FittedSite`) without their tensors."""

    form: Form
    response_error: float
    held_out_error: float | None
    seconds: float
    macs: tuple[int, int] | None
    spectrum: Spectrum | None


class _Stored(pydantic.BaseModel, extra="forbid"):
    """The metadata of a file.

    Attributes:
        records: records of the sites; None for a result without records.
        one: whether the result has one record rather than a list.
        rank: a site's rank, for a result that is a rank.
        fits: site name -> fitted factors without their tensors.
        declined: site name -> reason why the fit left it out.
        checksums: CRC-32 of each tensor's bytes.
    """

    records: list[SiteRecord] | None = None
    one: bool = False
    rank: int | None = None
    fits: dict[str, _Fit] | None = None
    declined: dict[str, str] = {}
    checksums: dict[str, int] = {}


@dataclass(kw_only=True)
class ResultStore:
    """A folder of results, created with the first one.

    Attributes:
        folder: the folder.
        key: identifies the model, machine and versions that the results hold for.
        reused: number of results read back so far.
    """

    folder: Path
    key: str
    reused: int = 0

    def __post_init__(self) -> None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if (self.folder / "key.txt").read_text(encoding="utf-8") == self.key:
                return
        remove(self.folder)

    def begun(self) -> Path:
        """Create the folder with its key where it does not exist, and return it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.txt").is_file():
            write_text(self.folder / "key.txt", self.key, durable=False)
        return self.folder

    def has(self, task: Task) -> bool:
        """Return whether the task's result has a file; `result` may still find it damaged."""
        return self._path(_stored_key(task)).is_file()

    def result(self, task: Task) -> tuple[bool, Any]:
        """Return whether the task's result is stored, and the result."""
        stored, tensors = self._read(_stored_key(task))
        if stored is None:
            return False, None
        if not tensors:
            return True, stored.rank
        factors, records = Factors(tensors["left"], tensors["right"]), stored.records or []
        return True, (factors, records[0] if stored.one else records)

    def keep(self, task: Task, result: Any) -> None:
        """Store a task's result: factors with one record or a list of them, a rank, or None."""
        if not isinstance(result, tuple):
            self._write(_stored_key(task), _Stored(rank=result), {})
            return
        factors, records = result
        one = isinstance(records, SiteRecord)
        stored = _Stored(records=[records] if one else list(records), one=one)
        self._write(_stored_key(task), stored, {"left": factors.left, "right": factors.right})

    def fitted(self, wanted: Mapping[str, Any]) -> tuple[dict[str, FittedSite], dict[str, str]] | None:
        """Return the stored fit of these splits and the reasons of sites that it left out; None without one.

        Args:
            wanted: site name -> (form, rank, bits).
        """
        stored, tensors = self._read(_stored_fit_key(wanted))
        if stored is None or stored.fits is None:
            return None
        found = {}
        for number, (name, fit) in enumerate(stored.fits.items()):
            left, right, bias = (tensors[f"{number}.{part}"] for part in PARTS)
            found[name] = FittedSite(
                replacement=Replacement(fit.form, left, right, bias),
                response_error=fit.response_error,
                held_out_error=fit.held_out_error,
                seconds=fit.seconds,
                macs=fit.macs,
                spectrum=fit.spectrum,
            )
        return found, dict(stored.declined)

    def keep_fitted(
        self, wanted: Mapping[str, Any], fitted: Mapping[str, FittedSite], declined: Mapping[str, str]
    ) -> None:
        """Store the factors of a fit."""
        fits: dict[str, _Fit] = {}
        tensors: dict[str, Tensor] = {}
        for number, (name, fit) in enumerate(fitted.items()):
            fits[name] = _Fit(
                form=fit.replacement.form,
                response_error=fit.response_error,
                held_out_error=fit.held_out_error,
                seconds=fit.seconds,
                macs=fit.macs,
                spectrum=fit.spectrum,
            )
            tensors |= {f"{number}.{part}": getattr(fit.replacement, part) for part in PARTS}
        self._write(_stored_fit_key(wanted), _Stored(fits=fits, declined=dict(declined)), tensors)

    def note(self) -> str:
        """Return the report's note about reused results, or ""."""
        if not self.reused:
            return ""
        return f"{self.reused} finished steps come from an earlier run that was interrupted; so do their times"

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, key: str) -> tuple[_Stored | None, dict[str, Tensor]]:
        """Return the file's metadata and tensors; None where it is missing or damaged."""
        path = self._path(key)
        if not path.is_file():
            return None, {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stored = _Stored.model_validate_json(metadata["stored"])
            if metadata["key"] != key or {name: _checksum(t) for name, t in tensors.items()} != stored.checksums:
                raise ValueError("the file is damaged")
        except UNREADABLE as error:
            log.info("a stored result is unreadable and is computed again: %s: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None, {}
        self.reused += 1
        return stored, tensors

    def _write(self, key: str, stored: _Stored, tensors: Mapping[str, Tensor]) -> None:
        """Store a result; one that cannot be stored is computed again by the next run."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stored.checksums = {name: _checksum(tensor) for name, tensor in held.items()}
        text = stored.model_dump_json()
        if _Stored.model_validate_json(text) != stored:
            return  # a number that JSON cannot hold
        try:
            self.begun()
            with atomic_file(self._path(key), durable=False) as work:
                save_file(held, work, metadata={"stored": text, "key": key})
        except (OSError, SafetensorError) as error:
            log.info("a result is not stored: %s", error)


def key_of(source: str, device: torch.device, *more: object) -> str:
    """Return the key of results: the model, the versions, and whatever of the machine may change a byte.

    Args:
        source: identifies the model.
        device: where factors are computed.
        more: what else the results depend on.
    """
    machine = [torch.get_num_threads(), str(device), processor(), asdict(rates(device))]
    return json.dumps([__version__, torch.__version__, source, *machine, *map(str, more)])


class StoringExecutor:
    """Takes results from a store, and has another executor compute the missing ones."""

    def __init__(self, executor: Executor, store: ResultStore) -> None:
        self._executor, self._store = executor, store

    def announce(self, tasks: Iterator[Task]) -> None:
        """Announce the tasks that are not stored."""
        self._executor.announce(task for task in tasks if not self._store.has(task))

    def result(self, task: Task) -> Any:
        """Return the task's result, stored or computed."""
        had_file = self._store.has(task)
        found, result = self._store.result(task)
        if found:
            return result
        result = self._executor.result(replace(task, announced=task.announced and not had_file))
        self._store.keep(task, result)
        return result

    def release(self, *weights: Hashable) -> None:
        """Release the weights in the other executor."""
        self._executor.release(*weights)


def _stored_key(task: Task) -> str:
    """Return a text that identifies a task's result; the times in its records are left out."""
    how = {name: _plain(value) for name, value in sorted(task.how.items())}
    return repr((task.compute.__name__, list(task.weights), how))


def _plain(value: Any) -> Any:
    if isinstance(value, SiteRecord):
        return value.model_dump(exclude={"seconds"})
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _stored_fit_key(wanted: Mapping[str, Any]) -> str:
    return json.dumps(["fit", sorted((name, list(split)) for name, split in wanted.items())])


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
