"""The running comparison of a shadow with the main version: the same numbers as `eval --reference`.

Each pair of answers is scored by the code of `eval` (`rsi_deploy.evaluation.accumulator`). Only sums are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsi_deploy.evaluation.accumulator import Scorer
from rsi_deploy.evaluation.intervals import wilson_interval
from rsi_deploy.evaluation.predictor import answer_rows
from rsi_deploy.serving.protocol.signature import Feeds, Outputs, rows


@dataclass(kw_only=True)
class _RunTimes:
    """Run times of one version: number of requests, their total seconds, and the last 4,096 of them."""

    count: int = 0
    total: float = 0.0
    recent: list[float] = field(default_factory=list)

    def note(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        self.recent.append(seconds)
        del self.recent[:-4096]

    @classmethod
    def joined(cls, parts: "Sequence[_RunTimes]") -> "_RunTimes":
        """Return the run times of several servers as one record."""
        recent = [seconds for part in parts for seconds in part.recent]
        return cls(count=sum(p.count for p in parts), total=sum(p.total for p in parts), recent=recent)

    def summary(self) -> dict[str, float]:
        recent = np.asarray(self.recent) * 1e3
        p50, p99 = (float(p) for p in np.percentile(recent, (50, 99))) if len(recent) else (0.0, 0.0)
        return {"mean_ms": 1e3 * self.total / max(self.count, 1), "p50_ms": p50, "p99_ms": p99}


class Shadow:
    """The comparison of two versions of a model.

    Args:
        main: version that answers the clients.
        shadow: version that is compared with it.

    Attributes:
        samples: number of compared samples.
        agreeing: number of samples with the same top-1 class.
        requests: number of compared requests.
        skipped: number of requests that the shadow did not run, for lack of time or after an error.
    """

    def __init__(self, main: str, shadow: str):
        self._versions = {"main": main, "shadow": shadow}
        self._scorer: Scorer | None = None
        self._sums: dict[str, float] = {}
        self._times = {"main": _RunTimes(), "shadow": _RunTimes()}
        self.samples = self.agreeing = self.requests = self.skipped = 0

    @classmethod
    def joined(cls, parts: "Sequence[Shadow]") -> "Shadow":
        """Return the comparisons of several servers (at least one) as one; they have the same pair of versions."""
        whole = cls(*parts[0]._versions.values())
        whole._scorer = next((part._scorer for part in parts if part._scorer is not None), None)
        for part in parts:
            for name, total in part._sums.items():
                whole._sums[name] = whole._sums.get(name, 0.0) + total
            whole.samples += part.samples
            whole.agreeing += part.agreeing
            whole.requests += part.requests
            whole.skipped += part.skipped
        whole._times = {which: _RunTimes.joined([part._times[which] for part in parts]) for which in whole._times}
        return whole

    def compare(self, feeds: Feeds, main: Outputs, shadow: Outputs, seconds: tuple[float, float]) -> None:
        """Add one pair of answers.

        Args:
            feeds: inputs of the request.
            main: outputs of the main version.
            shadow: outputs of the shadow.
            seconds: run times of both versions.

        Raises:
            UsageError, ModelError: the outputs cannot be compared; nothing is counted then.
        """
        batch = [answer_rows(outputs, rows(feeds), None) for outputs in (main, shadow)]
        if not all(batch):
            return
        if self._scorer is None:
            scorer = Scorer([f"version {v}" for v in self._versions.values()], None, (), "auto")
            scorer.check(batch)
            self._scorer = scorer
        reference, results = self._scorer.score(batch, None, feeds)
        self.samples += results.samples
        self.requests += 1
        self.agreeing += int((results.top == reference.top).sum())
        self._add("divergence", results.divergence)
        for name, (angles, distances) in results.values.items():
            self._add(f"cosine {name}", angles)
            self._add(f"distance {name}", distances)
        for time, took in zip(self._times.values(), seconds, strict=True):
            time.note(took)

    def summary(self) -> dict[str, Any]:
        """Return the comparison; agreement is in percent with its 95 % interval, or None if outputs are not classes."""
        is_classes = self._scorer is not None and self._scorer.kind == "classes"
        means = {name: total / self.samples for name, total in self._sums.items()} if self.samples else {}
        return {
            "versions": self._versions,
            "requests": self.requests,
            "samples": self.samples,
            "skipped": self.skipped,
            "kind": None if self._scorer is None else self._scorer.kind,
            "agreement": 100 * self.agreeing / self.samples if is_classes else None,
            "agreement_interval": list(wilson_interval(self.agreeing, self.samples)) if is_classes else None,
            "divergence": means.get("divergence") if is_classes else None,
            "values": _values(means),
            "latency": {which: time.summary() for which, time in self._times.items()},
        }

    def _add(self, name: str, values: Any) -> None:
        if len(values):
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())


def _values(means: Mapping[str, float]) -> list[dict[str, Any]]:
    names = [name.removeprefix("cosine ") for name in means if name.startswith("cosine ")]
    return [{"output": n, "cosine": means[f"cosine {n}"], "distance": means[f"distance {n}"]} for n in names]
