"""One point of a sweep made: an export of the dense model at its share."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import ModelError
from rsi_deploy.exporting.api import export
from rsi_deploy.exporting.cache import SweepCache


@dataclass(frozen=True, kw_only=True)
class MadePoint:
    """What came of a point: its bundle, or the problem that stands in the way; and the seconds it took."""

    problem: ModelError | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PointJob:
    """A point to be made: its number, and the options of its export."""

    number: int
    asked: Mapping[str, Any]

    def made_in(self, folder: Path, dense: Path, kept: SweepCache) -> MadePoint:
        """Make the bundle `folder` of the model at `dense`.

        Raises:
            UsageError: a request that does not fit model or data.
            GateError: a gate failed.
        """
        started = time.monotonic()
        problem = None
        try:
            export(str(dense), folder, **self.asked, kept=kept, force=True)
        except ModelError as error:
            problem = error
        return MadePoint(problem=problem, seconds=time.monotonic() - started)


def place(number: int) -> str:
    """The folder of a point, within its sweep's."""
    return f"point-{number:02d}"
