"""Progress for a log: one line as a step begins, and within a step at most one a minute.

[0:04] calibrate and plan: measure what each site may lose, choose the ranks, fit the factors
[1:05] calibrate and plan: features.3, 12 of 57 done (21 %), about 4 minutes left
[5:40] calibrate and plan: done after 5:36
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rsi_deploy.core.text import on_terminal

EVERY = 60.0
"""Seconds between two lines within a step."""

MEANINGS = {
    "load": "load the model",
    "convert": "make an ONNX folder of a folder of transformers, which the cache folder keeps",
    "read": "read the ONNX file and fold its BatchNorms",
    "export dense": "make the dense ONNX model from torch",
    "verify opset": "compare the model in its new opset with the file",
    "verify exporter": "compare the dense ONNX model with torch",
    "read dense": "count the dense model's bytes and parameters",
    "trace": "run the dense model on the probe inputs",
    "accuracy dense": "evaluate the dense model on the data",
    "cost table": "time the splits of every site shape on this machine",
    "plan and compare precisions": "make models of several precisions, and judge and measure them side by side",
    "calibrate and plan": "measure what each site may lose, choose the ranks, fit the factors",
    "factorize, split, save": "factorize what is not fitted yet, and write the compressed model",
    "latency": "time the models side by side",
    "verify surgery": "compare a full-rank split with the dense model",
    "verify approximation": "compare the compressed model with the dense one",
    "accuracy compressed": "evaluate the compressed model on the data",
    "softmax bound": "bound what the factorized head does to the scores",
    "certificate": "compare both models on the calibration data",
    "trace compressed": "count the compressed model's MACs",
    "see what unseen data keep": "fit every site and several sizes, and compare their outputs on the check part",
    "spectra": "compute the singular values of the weights",
    "side by side": "time the dense model and all points in one run",
}


@dataclass
class _Step:
    """A step that is running.

    Attributes:
        name: of the step.
        began: when it began, by the clock.
        series: number of pieces, and when and with which of them their count began.
        index: of the last piece.
    """

    name: str
    began: float
    series: tuple[int, float, int] = (0, 0.0, 0)
    index: int = -1


class ProgressLines:
    """The lines of a log; a `rsi_deploy.core.progress.Listener`.

    Args:
        write: takes a line without its end.
        clock: seconds that only rise.
        after: seconds for which the lines are held back: what fails at once says its error alone.
    """

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic, after: float = 0.0
    ) -> None:
        self._write, self._clock, self._after = write, clock, after
        self._began = self._last = clock()
        self._held: list[str] = []
        self._steps: list[_Step] = []

    def begin(self, name: str) -> None:
        """See `Listener`."""
        self._steps.append(_Step(name=name, began=self._clock()))
        meaning = MEANINGS.get(name)
        self._line(name if meaning is None else f"{name}: {meaning}")

    def end(self, name: str) -> None:
        """See `Listener`."""
        took = self._clock() - self._steps[-1].began
        if took >= EVERY:
            self._line(f"{name}: done after {_clocked(took)}")
        self._steps.pop()

    def at(self, what: str, index: int, total: int) -> None:
        """See `Listener`; without a step, what is at work stands alone."""
        now = self._clock()
        here = self._steps[-1] if self._steps else _Step(name="", began=self._began)
        if index <= here.index or total != here.series[0]:
            here.series = (total, now, index)
        here.index = index
        if now - self._began >= self._after:
            self.flush()
        if now - self._last < EVERY:
            return
        _, since, first = here.series
        words = [what, f"{index} of {total} done ({100 * index / max(total, 1):.0f} %)"]
        if index > first:
            words.append(f"about {_duration((now - since) / (index - first) * (total - index))} left")
        self._line(": ".join(filter(None, [here.name, ", ".join(filter(None, words))])))

    def flush(self) -> None:
        """Write what is held back."""
        for line in self._held:
            self._write(line)
        self._held.clear()

    def _line(self, text: str) -> None:
        self._last = self._clock()
        indent = "  " * max(len(self._steps) - 1, 0)
        self._held.append(f"[{_clocked(self._last - self._began)}] {indent}{on_terminal(' '.join(text.split()))}")
        if self._last - self._began >= self._after:
            self.flush()


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
