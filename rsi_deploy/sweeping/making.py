"""One point of a sweep: an export of the dense model at its share."""

import time
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.api import export_run
from rsi_deploy.exporting.cache import SweepCache


@dataclass(frozen=True, kw_only=True)
class MadePoint:
    """The outcome of a point.

    Attributes:
        problem: why there is no bundle; None where there is one.
        seconds: time that the point took.
    """

    problem: ModelError | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PointJob:
    """A point that is to be made.

    Attributes:
        number: number of the point, from 1.
        config: settings of its export.
        command: command line for its report.
        recipe: recipe that makes its bundle again from the user's model.
        original: absolute path of the user's model; None if it is no path.
    """

    number: int
    config: ExportConfig
    command: str
    recipe: str
    original: str | None

    def made_in(self, folder: Path, dense: Path, kept: SweepCache) -> MadePoint:
        """Make the bundle `folder` of the model at `dense`.

        Raises:
            UsageError: a request that does not fit model or data.
            GateError: a gate failed.
        """
        started = time.monotonic()
        problem = None
        try:
            run = export_run(
                str(dense), self.config, command=self.command, recipe=self.recipe, kept=kept, original=self.original
            )
            run.write_bundle(folder, force=True)
        except ModelError as error:
            problem = error
        return MadePoint(problem=problem, seconds=time.monotonic() - started)


def place(number: int) -> str:
    """Return the name of a point's folder within its sweep's."""
    return f"point-{number:02d}"
