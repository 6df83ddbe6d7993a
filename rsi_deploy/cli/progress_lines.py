"""Progress for a log: one line as a step begins, and within a step at most one a minute.

[0:04] calibrate and plan: measure what each site may lose, choose the ranks, fit the factors
[1:05] calibrate and plan: features.3, 12 of 57 done (21 %), about 4 minutes left
[5:40] calibrate and plan: done after 5:36
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rsi_deploy.report.text import on_terminal

EVERY = 60.0
"""Seconds between two lines within a step."""

MEANINGS = {
    "load": "load the model",
    "read": "read the ONNX file and fold its BatchNorms",
    "export dense": "make the dense ONNX model from torch",
    "verify opset": "compare the model in its new opset with the file",
    "verify exporter": "compare the dense ONNX model with torch",
    "read dense": "count the dense model's bytes and parameters",
    "trace": "run the dense model on the probe inputs",
    "accuracy dense": "evaluate the dense model on the data",
    "cost table": "time the splits of every site shape on this machine",
    "calibrate and plan": "measure what each site may lose, choose the ranks, fit the factors",
    "factorize, split, save": "factorize what is not fitted yet, and write the compressed model",
    "latency": "time the models side by side",
    "verify surgery": "compare a full-rank split with the dense model",
    "verify approximation": "compare the compressed model with the dense one",
    "accuracy compressed": "evaluate the compressed model on the data",
    "softmax bound": "bound what the factorized head does to the scores",
    "certificate": "compare both models on the calibration data",
    "trace compressed": "count the compressed model's MACs",
    "spectra": "compute the singular values of the weights",
    "side by side": "time the dense model and all points in one run",
}


@dataclass
class _Step:
    """A step that is at work.

    Attributes:
        name: of the step.
        began: when it began, by the clock.
        is_said: whether its first line is written.
        series: number of pieces, and when and with which of them their count began.
        index: of the last piece.
    """

    name: str
    began: float
    is_said: bool = False
    series: tuple[int, float, int] = (0, 0.0, 0)
    index: int = -1


class ProgressLines:
    """Writes the lines; a `rsi_deploy.steps.Listener`.

    Args:
        write: takes a line without its end.
        clock: seconds that only rise.
        after: seconds before which nothing is written: verbs that are mostly short have nothing to say.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, after: float = 0.0
    ) -> None:
        self._write, self._clock, self._after = write, clock, after
        self._began = self._last = clock()
        self._steps: list[_Step] = []

    def begin(self, name: str) -> None:
        """See `Listener`."""
        self._steps.append(_Step(name=name, began=self._clock()))
        self._say_begun()

    def end(self, name: str) -> None:
        """See `Listener`."""
        ended = self._steps.pop()
        took = self._clock() - ended.began
        if ended.is_said and took >= EVERY:
            self._line(f"{ended.name}: done after {_clocked(took)}", depth=len(self._steps))

    def at(self, what: str, index: int, total: int) -> None:
        """See `Listener`; without a step, what is at work stands alone."""
        now = self._clock()
        here = self._steps[-1] if self._steps else _Step(name="", began=self._began, is_said=True)
        if index <= here.index or total != here.series[0]:
            here.series = (total, now, index)
        here.index = index
        self._say_begun()
        if now - self._last < EVERY or now - self._began < self._after:
            return
        _, since, first = here.series
        left = (now - since) / (index - first) * (total - index) if index > first else None
        words = [what, f"{index} of {total} done ({100 * index / max(total, 1):.0f} %)"]
        words += [] if left is None else [f"about {_duration(left)} left"]
        self._line(": ".join(filter(None, [here.name, ", ".join(filter(None, words))])), depth=len(self._steps) - 1)

    def _say_begun(self) -> None:
        """The first lines of the steps at work, where they are not written yet."""
        if self._clock() - self._began < self._after:
            return
        for depth, step in enumerate(self._steps):
            if not step.is_said:
                step.is_said = True
                self._line(": ".join(filter(None, [step.name, MEANINGS.get(step.name, "")])), depth=depth)

    def _line(self, text: str, depth: int) -> None:
        self._last = self._clock()
        self._write(f"[{_clocked(self._last - self._began)}] {'  ' * max(depth, 0)}{on_terminal(text)}")


def _clocked(seconds: float) -> str:
    """Minutes and seconds.

    >>> _clocked(4.2), _clocked(661)
    ('0:04', '11:01')
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _duration(seconds: float) -> str:
    """A time that is only estimated.

    >>> _duration(20), _duration(240), _duration(60)
    ('20 seconds', '4 minutes', '1 minute')
    """
    if seconds < EVERY:
        return f"{max(round(seconds), 1)} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minute{'s' * (minutes > 1)}"
