"""What several servers of the same models count and compare, told as one: a board where each puts its own.

    replica --every second, and before it answers--> Board --all that is fresh--> replica --> /metrics, /v2/.../shadow

Metrics keep apart by a label `replica`, as Prometheus would have it of several processes; comparisons with a shadow are
sums, and are added up. What a replica had counted goes with it, `KEPT_SECONDS` after it was last heard of.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from rsi_deploy.serving.shadow import Shadow

KEPT_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True)
class ReplicaCounts:
    """What one replica has counted so far.

    Attributes:
        metrics: in Prometheus' text format.
        shadows: name of a model -> its comparison.
    """

    metrics: bytes
    shadows: Mapping[str, Shadow] = field(default_factory=dict)


class Board:
    """Where the replicas of a service put what they count.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._put: dict[str, tuple[float, ReplicaCounts]] = {}

    async def exchange(self, replica: str, counted: ReplicaCounts) -> dict[str, ReplicaCounts]:
        """Put one's own, in place of what was there, and get everybody's who was heard of lately.

        It awaits nothing: on one event loop no other call comes between.
        """
        now = self._clock()
        self._put[replica] = now, counted
        self._put = {name: put for name, put in self._put.items() if now - put[0] < KEPT_SECONDS}
        return {name: counted for name, (_, counted) in self._put.items()}


def joined_metrics(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of several replicas, each with its name as a label `replica`."""
    registry = CollectorRegistry()
    registry.register(_Several(texts))
    return bytes(generate_latest(registry))


class _Several:
    """What Prometheus' registry asks for metrics."""

    def __init__(self, texts: Mapping[str, bytes]):
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text.decode()):
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    kept.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        return families.values()
