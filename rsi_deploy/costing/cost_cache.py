"""Cost tables and their parts on disk, by what their times hold for: hardware, software, provider and threads.

    CACHE/costs/<conditions>/site-<signature>.json     one shape, shared by all models that have it
                             table-<model, inputs>.json  one model

CACHE is $RSI_DEPLOY_CACHE, else $XDG_CACHE_HOME/rsi-deploy, else ~/.cache/rsi-deploy. What cannot be read there is
measured again; a cache that cannot be written costs time and nothing else. Times that were too noisy to decide by are
those of a busy hour: they are used again while it lasts, and measured again afterwards.
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
"""Seconds for which noisy times are used again."""


def conditions_here(provider: str, threads: int | None) -> Conditions:
    """What times measured now, in this process, hold for.

    Raises:
        UsageError: a provider that is not here.
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
    )


@dataclass(frozen=True, kw_only=True)
class CostCache:
    """The cache of one set of conditions.

    Attributes:
        folder: of these conditions.
    """

    folder: Path

    @classmethod
    def of(cls, conditions: Conditions) -> "CostCache":
        """The cache for times of these conditions."""
        return cls(folder=cache_folder() / "costs" / _digest(conditions.model_dump_json())[:24])

    def costs(self, signatures: Sequence[str]) -> dict[str, SiteCost]:
        """Signature -> times, of those that are known."""
        found = {}
        for name in signatures:
            file = f"site-{_digest(name)}.json"
            cost = self._read(SiteCost, file)
            if cost is not None and cost.signature == name and not self._is_past([cost], file):
                found[name] = cost
        return found

    def keep(self, costs: Sequence[SiteCost]) -> None:
        """Store times of shapes."""
        for cost in costs:
            self._write(cost, f"site-{_digest(cost.signature)}.json")

    def table(self, key: str) -> CostTable | None:
        """The table of a model, by all that it depends on in one text."""
        file = f"table-{_digest(key)}.json"
        table = self._read(CostTable, file)
        return None if table is None or self._is_past(table.costs, file) else table

    def keep_table(self, key: str, table: CostTable) -> None:
        """Store it."""
        self._write(table, f"table-{_digest(key)}.json")

    def _is_past(self, costs: Sequence[SiteCost], file: str) -> bool:
        """Whether times are noisy and of an hour that is over."""
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
