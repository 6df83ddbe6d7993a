"""Finished work of a run that was killed, for the next one: exports of large models go on from it.

    FactorSource --Call--> KeepingCrew --> kept: read back, and checked
                                       --> computed by the executor, then kept
    Calibrator ---fitted-> the same for all factors of a fit together, once it is done

A result is kept in a file of its own, named for what it is of: the weights' names, the rank, the solver with its seed.
All of them are for one model, machine and set of versions (`key.txt`); those of another are dropped. Since a call is a
function of its weights and settings alone (`rsi_deploy.execution.executor`), what comes of kept results is what comes
without, to the byte. Keeping writes the factors once more, which is little beside making them where weights are
large: below `LARGE` bytes of weights nothing is kept.
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
"""Bytes of a model's weights from which its finished sites are kept."""

PARTS = ("left", "right", "bias")
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError, TypeError, pydantic.ValidationError)
log = logging.getLogger(__name__)


class _Fit(pydantic.BaseModel, extra="forbid"):
    """What is no tensor of a site's fitted factors (`FittedSite`)."""

    form: Form
    response_error: float
    seconds: float
    macs: tuple[int, int] | None
    spectrum: Spectrum | None


class _Stored(pydantic.BaseModel, extra="forbid"):
    """What a file says beside its tensors.

    Attributes:
        records: of the sites; None where the result has none.
        one: whether the result has one record rather than a list of them.
        rank: of a site, where that is the result.
        fits: of fitted factors: name -> what is no tensor.
        declined: site name -> why it was left out of a fit.
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
    """Results in a folder, which is made with the first of them.

    Attributes:
        folder: where they lie.
        key: what all of them are for.
        reused: how many were taken from an earlier run.
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
        """The folder, made and told what it is for where that was not so."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.txt").is_file():
            write_text(self.folder / "key.txt", self.key, durable=False)
        return self.folder

    def has(self, call: Task) -> bool:
        """Whether there is a file for the call; `result` may still find it damaged."""
        return self._path(_stored_key(call)).is_file()

    def result(self, call: Task) -> tuple[bool, Any]:
        """Whether the call's result is kept, and the result."""
        stored, tensors = self._read(_stored_key(call))
        if stored is None:
            return False, None
        if not tensors:
            return True, stored.rank
        factors, records = Factors(tensors["left"], tensors["right"]), stored.records or []
        return True, (factors, records[0] if stored.one else records)

    def keep(self, call: Task, result: Any) -> None:
        """Keep a call's result: factors with one record or a list of them, a rank, or None."""
        if not isinstance(result, tuple):
            self._write(_stored_key(call), _Stored(rank=result), {})
            return
        factors, records = result
        one = isinstance(records, SiteRecord)
        stored = _Stored(records=[records] if one else list(records), one=one)
        self._write(_stored_key(call), stored, {"left": factors.left, "right": factors.right})

    def fitted(self, wanted: Mapping[str, Any]) -> tuple[dict[str, FittedSite], dict[str, str]] | None:
        """What a fit of these splits, name -> (form, rank), has made, and why sites were left out; None before it."""
        stored, tensors = self._read(_stored_fit_key(wanted))
        if stored is None or stored.fits is None:
            return None
        found = {}
        for number, (name, fit) in enumerate(stored.fits.items()):
            left, right, bias = (tensors[f"{number}.{part}"] for part in PARTS)
            found[name] = FittedSite(
                replacement=Replacement(fit.form, left, right, bias),
                response_error=fit.response_error,
                seconds=fit.seconds,
                macs=fit.macs,
                spectrum=fit.spectrum,
            )
        return found, dict(stored.declined)

    def keep_fitted(
        self, wanted: Mapping[str, Any], fitted: Mapping[str, FittedSite], declined: Mapping[str, str]
    ) -> None:
        """Keep what a fit has made."""
        fits: dict[str, _Fit] = {}
        tensors: dict[str, Tensor] = {}
        for number, (name, fit) in enumerate(fitted.items()):
            fits[name] = _Fit(
                form=fit.replacement.form,
                response_error=fit.response_error,
                seconds=fit.seconds,
                macs=fit.macs,
                spectrum=fit.spectrum,
            )
            tensors |= {f"{number}.{part}": getattr(fit.replacement, part) for part in PARTS}
        self._write(_stored_fit_key(wanted), _Stored(fits=fits, declined=dict(declined)), tensors)

    def note(self) -> str:
        """What a reader of the report should know."""
        if not self.reused:
            return ""
        return f"{self.reused} finished steps were taken from an earlier run that was killed; their times are its own"

    def _path(self, told: str) -> Path:
        return self.folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"

    def _read(self, told: str) -> tuple[_Stored | None, dict[str, Tensor]]:
        """What is kept for this, with its tensors; None where nothing is, or it is damaged."""
        path = self._path(told)
        if not path.is_file():
            return None, {}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            stored = _Stored.model_validate_json(metadata["stored"])
            if metadata["told"] != told or {name: _checksum(t) for name, t in tensors.items()} != stored.checksums:
                raise ValueError("the file is not what was written")
        except UNREADABLE as error:
            log.info("a kept result is made again: %s: %s", path.name, error)
            path.unlink(missing_ok=True)
            return None, {}
        self.reused += 1
        return stored, tensors

    def _write(self, told: str, stored: _Stored, tensors: Mapping[str, Tensor]) -> None:
        """Keep it, or do without: what cannot be kept is made again."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stored.checksums = {name: _checksum(tensor) for name, tensor in held.items()}
        text = stored.model_dump_json()
        if _Stored.model_validate_json(text) != stored:
            return  # a number that JSON has no word for
        try:
            self.begun()
            with atomic_file(self._path(told), durable=False) as work:
                save_file(held, work, metadata={"stored": text, "told": told})
        except (OSError, SafetensorError) as error:
            log.info("a finished result is not kept: %s", error)


def key_of(source: str, device: torch.device, *more: object) -> str:
    """What finished work holds for: the model, the versions, and all of the machine that may change a byte.

    Args:
        source: what tells the model.
        device: where factors are computed.
        more: what else they depend on.
    """
    machine = [torch.get_num_threads(), str(device), processor(), asdict(rates(device))]
    return json.dumps([__version__, torch.__version__, source, *machine, *map(str, more)])


class StoringExecutor:
    """A executor that computes what is not kept."""

    def __init__(self, executor: Executor, finished: ResultStore) -> None:
        self._executor, self._finished = executor, finished

    def ahead(self, calls: Iterator[Task]) -> None:
        """Have the executor told of what is not kept."""
        self._executor.ahead(call for call in calls if not self._finished.has(call))

    def made(self, call: Task) -> Any:
        """The call's result, kept or computed."""
        was_kept = self._finished.has(call)
        found, result = self._finished.result(call)
        if found:
            return result
        result = self._executor.made(replace(call, announced=call.announced and not was_kept))
        self._finished.keep(call, result)
        return result

    def done(self, *weights: Hashable) -> None:
        """Tell the executor."""
        self._executor.done(*weights)


def _stored_key(call: Task) -> str:
    """What a call computes, of what and how, in one text; what its records' times are says nothing of it."""
    how = {name: _plain(value) for name, value in sorted(call.how.items())}
    return repr((call.compute.__name__, list(call.weights), how))


def _plain(value: Any) -> Any:
    if isinstance(value, SiteRecord):
        return value.model_dump(exclude={"seconds"})
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _stored_fit_key(wanted: Mapping[str, Any]) -> str:
    return json.dumps(["fit", sorted((name, list(split)) for name, split in wanted.items())])


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
