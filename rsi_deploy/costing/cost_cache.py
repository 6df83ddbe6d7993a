"""A disk cache of cost tables and their parts, by the conditions of their times: hardware, software, provider, threads,
scheme.

    CACHE/costs/<conditions>/site-<signature>.json     one shape, shared by all models that have it
                             table-<model, inputs>.json  one model

CACHE is $RSI_DEPLOY_CACHE, else $XDG_CACHE_HOME/rsi-deploy, else ~/.cache/rsi-deploy. Unreadable entries are measured
again, and errors on writing are ignored. Times that are too noisy to decide by are used for an hour only, because they
come from a busy machine.
"""

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydantic

from rsi_deploy.core.cache_folder import cache_folder
from rsi_deploy.costing.cost_table import NOISY, Conditions, CostTable, SiteCost
from rsi_deploy.io.atomic import write_text
from rsi_deploy.io.documents import read_document
from rsi_deploy.runtime.machine import environment, onnxruntime_distributions
from rsi_deploy.runtime.provider_spec import parse_provider

Document = TypeVar("Document", bound=pydantic.BaseModel)

NOISY_FOR = 3600.0
"""Seconds for which noisy times are used."""


def conditions_here(provider: str, threads: int | None, scheme: str = "float32") -> Conditions:
    """Return the conditions of times that are measured in this process.

    Args:
        provider: execution provider with its options.
        threads: threads inside one operator; None for onnxruntime's default.
        scheme: precision of the products.

    Raises:
        UsageError: the provider is not available.
    """
    here = environment()
    return Conditions(
        cpu=here.cpu,
        cores=here.cores,
        cpu_flags=here.cpu_flags,
        gpus=here.gpus,
        onnxruntime=onnxruntime_distributions(),
        provider=str(parse_provider(provider)),
        threads=threads,
        scheme=scheme,
    )


@dataclass(frozen=True, kw_only=True)
class CostCache:
    """The cache for one set of conditions.

    Attributes:
        folder: folder of these conditions.
    """

    folder: Path

    @classmethod
    def of(cls, conditions: Conditions) -> "CostCache":
        """Return the cache for times of these conditions."""
        return cls(folder=cache_folder() / "costs" / _digest(conditions.model_dump_json())[:24])

    def costs(self, signatures: Sequence[str]) -> dict[str, SiteCost]:
        """Return signature -> times for the shapes in the cache."""
        found = {}
        for name in signatures:
            file = f"site-{_digest(name)}.json"
            cost = self._read(SiteCost, file)
            if cost is not None and cost.signature == name and not self._is_outdated([cost], file):
                found[name] = cost
        return found

    def keep(self, costs: Sequence[SiteCost]) -> None:
        """Store the times of shapes."""
        for cost in costs:
            self._write(cost, f"site-{_digest(cost.signature)}.json")

    def table(self, key: str) -> CostTable | None:
        """Return the table of a model, or None. `key` is a text of everything that the table depends on."""
        file = f"table-{_digest(key)}.json"
        table = self._read(CostTable, file)
        return None if table is None or self._is_outdated(table.costs, file) else table

    def keep_table(self, key: str, table: CostTable) -> None:
        """Store the table of a model."""
        self._write(table, f"table-{_digest(key)}.json")

    def _is_outdated(self, costs: Sequence[SiteCost], file: str) -> bool:
        """Return whether times are noisy and more than an hour old."""
        if all(cost.half_width is not None and cost.half_width < NOISY for cost in costs):
            return False
        with contextlib.suppress(OSError):
            return time.time() - (self.folder / file).stat().st_mtime > NOISY_FOR
        return True

    def _read(self, kind: type[Document], name: str) -> Document | None:
        try:
            return kind.model_validate_json(read_document(self.folder / name))
        except (OSError, UnicodeDecodeError, pydantic.ValidationError):
            return None

    def _write(self, document: pydantic.BaseModel, name: str) -> None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / name, document.model_dump_json(), durable=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
