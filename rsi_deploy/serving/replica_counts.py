"""Metrics and shadow comparisons of several replicas, collected on a board that all of them share.

    replica --every second, and before it answers--> Board --counts of all replicas--> /metrics, /v2/.../shadow

Metrics of the replicas stay separate, with a label `replica`, as Prometheus expects of several processes. Comparisons
with a shadow are sums and are added up. The counts of a replica are dropped `KEPT_SECONDS` after its last message.
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
    """The counts of one replica.

    Attributes:
        metrics: metrics in Prometheus' text format.
        shadows: name of a model -> comparison with its shadow.
    """

    metrics: bytes
    shadows: Mapping[str, Shadow] = field(default_factory=dict)


class Board:
    """The counts of all replicas of a service.

    Args:
        clock: function that returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._counts: dict[str, tuple[float, ReplicaCounts]] = {}

    async def exchange(self, replica: str, counts: ReplicaCounts) -> dict[str, ReplicaCounts]:
        """Store the counts of one replica and return the recent counts of all.

        It awaits nothing, so on one event loop no other call runs in between.
        """
        now = self._clock()
        self._counts[replica] = now, counts
        self._counts = {name: entry for name, entry in self._counts.items() if now - entry[0] < KEPT_SECONDS}
        return {name: counts for name, (_, counts) in self._counts.items()}


def joined_metrics(texts: Mapping[str, bytes]) -> bytes:
    """Return the metrics of several replicas in one text, each with its name as the label `replica`."""
    registry = CollectorRegistry()
    registry.register(_ReplicaCollector(texts))
    return bytes(generate_latest(registry))


class _ReplicaCollector:
    """A collector for Prometheus' registry."""

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
