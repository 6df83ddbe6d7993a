"""The times of an export's stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rsi_deploy.core.progress import step
from rsi_deploy.report.schema import Stage


class StageClock:
    """Times the stages of one export, and reports them as steps while they run.

    Attributes:
        stages: the stages that are over, in order.
    """

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that fails is not recorded."""
        started = time.perf_counter()
        with step(name):
            yield
        self.stages.append(Stage(name=name, seconds=time.perf_counter() - started))
