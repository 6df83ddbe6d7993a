"""The request of `bench`: the models, the matrix of configurations, and the separate measurements.

    matrix   batches x shapes x threads x precisions, in this order

Shapes are written `ids=1x32,1x128`. Several shapes of one input make several configurations; every other input has one
shape, or the same number. `N` is the batch: `ids=Nx32,Nx128`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rsi_deploy.benchmark.result import Precision
from rsi_deploy.benchmark.variants import Feeds
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.feeds.shapes import parse_shape

Shapes = dict[str, tuple[int, ...]]
Size = int | str  # "N" is the batch


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of the matrix; `shapes` holds the inputs with a requested shape."""

    batch: int
    shapes: Shapes
    threads: int | None
    precision: Precision

    @property
    def name(self) -> str:
        """The name for progress reports, such as "batch 8, ids 8x128, 2 threads"."""
        sizes = [f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items()]
        threads = [] if self.threads is None else [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        return ", ".join(
            [f"batch {self.batch}", *sizes, *threads, *([self.precision] if self.precision != "stored" else [])]
        )


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One run of `bench`.

    Attributes:
        models: files of the models.
        labels: one label per model.
        batches: batch sizes of the matrix.
        shapes: input name -> shapes of the matrix, as parsed by `matrix_shapes`.
        threads: numbers of threads of the matrix; None for onnxruntime's default, or with `pinned` one per core.
        precisions: precisions of the matrix: `stored`, `float16`.
        pinned: cores to run on; () for all.
        provider: execution provider with options.
        allow_fallback: allow nodes to run on other providers than the requested one.
        seconds: time for each configuration and each separate measurement.
        budget: total seconds in place of `seconds`; None for no budget.
        precision: relative half width of intervals that are narrow enough.
        seed: random seed for inputs, orders of turns and the bootstrap.
        feeds: input name -> array, in place of random inputs.
        cold_start: whether to measure cold starts.
        memory: whether to measure resident memory.
        memory_limit: memory limit in bytes; None for no limit.
        burst_gap: idle seconds before a burst; None for no bursts.
        streams: numbers of threads that share a session; () for no streams.
        throughput: whether to measure the throughput of growing batches.
        profile: whether to profile operators and sites.
    """

    models: tuple[Path, ...]
    labels: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    shapes: Mapping[str, tuple[tuple[Size, ...], ...]] = field(default_factory=dict)
    threads: tuple[int | None, ...] = (None,)
    precisions: tuple[Precision, ...] = ("stored",)
    pinned: tuple[int, ...] = ()
    provider: str = "cpu"
    allow_fallback: bool = False
    seconds: float = 10.0
    budget: float | None = None
    precision: float = 0.02
    seed: int = 0
    feeds: Feeds | None = None
    cold_start: bool = False
    memory: bool = False
    memory_limit: int | None = None
    burst_gap: float | None = None
    streams: tuple[int, ...] = ()
    throughput: bool = False
    profile: bool = False

    def settings(self) -> list[Setting]:
        """Return the configurations of the matrix."""
        threads: tuple[int | None, ...] = tuple(n or len(self.pinned) or None for n in self.threads)
        made = [
            Setting(batch=batch, shapes=shapes, threads=count, precision=precision)
            for batch, number, count, precision in itertools.product(
                self.batches, range(self._shapes_each()), threads, self.precisions
            )
            for shapes in [self._shapes(number, batch)]
        ]
        return list({repr(setting): setting for setting in made}.values())

    def separate(self) -> int:
        """Return the number of separate measurements that take a share of the time."""
        return sum((self.cold_start, self.burst_gap is not None, bool(self.streams), self.throughput))

    def share(self) -> float:
        """Return the seconds for each separate measurement, an equal part of the budget if there is one."""
        return self.seconds if self.budget is None else self.budget / (1 + self.separate())

    def _shapes_each(self) -> int:
        counts = {len(shapes) for shapes in self.shapes.values()} - {1}
        if len(counts) > 1:
            numbers = ", ".join(f"{name} {len(shapes)}" for name, shapes in self.shapes.items())
            raise UsageError(
                f"--input-shape: inputs have one shape or equally many, but got {numbers}; give as many for each"
            )
        return counts.pop() if counts else 1

    def _shapes(self, number: int, batch: int) -> Shapes:
        chosen = {name: shapes[number if len(shapes) > 1 else 0] for name, shapes in self.shapes.items()}
        return {name: tuple(batch if size == "N" else int(size) for size in shape) for name, shape in chosen.items()}


def matrix_shapes(texts: Sequence[str]) -> dict[str, tuple[tuple[Size, ...], ...]]:
    """Parse `NAME=1x32,1x128` texts; `N` is the batch.

    >>> matrix_shapes(["ids=Nx32,Nx128"])
    {'ids': (('N', 32), ('N', 128))}

    Raises:
        UsageError: says what came.
    """
    shapes: dict[str, tuple[tuple[Size, ...], ...]] = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        if not equals or not name:
            raise UsageError(f"--input-shape takes NAME=1x128, with the input's name, but got {text!r}")
        if name in shapes:
            raise UsageError(f"--input-shape: {name} appears twice; join several shapes by commas: {name}=1x32,1x128")
        shapes[name] = tuple(_shape(part) for part in sizes.split(","))
    return shapes


def _shape(text: str) -> tuple[Size, ...]:
    first, x, rest = text.partition("x")
    if first == "N":
        return ("N", *(parse_shape(rest) or ())) if x else ("N",)
    return parse_shape(text) or ()
