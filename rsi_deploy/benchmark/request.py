"""What `bench` is asked for: the models, the matrix of configurations, and the separate measurements.

    matrix   batches x shapes x threads x precisions, in this order

Shapes are written `ids=1x32,1x128`: several for one input make several configurations; other inputs have one for all,
or as many. `N` stands for the batch: `ids=Nx32,Nx128`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rsi_deploy.benchmark.result import Precision
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.runtime.feeds.shapes import parse_shape

Shapes = dict[str, tuple[int, ...]]
Size = int | str  # "N" is the batch


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One configuration of the matrix; `shapes` are of the inputs that were given one."""

    batch: int
    shapes: Shapes
    threads: int | None
    precision: Precision

    @property
    def name(self) -> str:
        """For progress: "batch 8, ids 8x128, 2 threads"."""
        sizes = [f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes.items()]
        threads = [] if self.threads is None else [f"{self.threads} thread{'s' * (self.threads > 1)}"]
        return ", ".join(
            [f"batch {self.batch}", *sizes, *threads, *([self.precision] if self.precision != "stored" else [])]
        )


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One run.

    Attributes:
        models: files.
        labels: one a model.
        batches: of the matrix, like the three that follow.
        shapes: input name -> shapes, as `matrix_shapes` reads them.
        threads: None is onnxruntime's default, or with `pinned` one a core.
        precisions: `stored`, `float16`.
        pinned: cores to run on; () for all.
        provider: with options.
        allow_fallback: measure what runs, even where it is not the provider asked for.
        seconds: for each configuration, and each separate measurement.
        budget: seconds in all, in place of `seconds`; None without one.
        precision: relative half width of the intervals that is narrow enough.
        seed: of everything.
        feeds: input name -> array, in place of random inputs.
        cold_start: measure it; like those that follow.
        memory: resident memory.
        memory_limit: ceiling in bytes; None without one.
        burst_gap: seconds of idleness before a burst; None without bursts.
        streams: numbers of threads; () without.
        throughput: growing batches.
        profile: time per op type and site.
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
        """The configurations of the matrix."""
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
        """How many separate measurements take a share of the time."""
        return sum((self.cold_start, self.burst_gap is not None, bool(self.streams), self.throughput))

    def share(self) -> float:
        """Seconds for each separate measurement: under a budget a fair part of it."""
        return self.seconds if self.budget is None else self.budget / (1 + self.separate())

    def _shapes_each(self) -> int:
        counts = {len(shapes) for shapes in self.shapes.values()} - {1}
        if len(counts) > 1:
            told = ", ".join(f"{name} {len(shapes)}" for name, shapes in self.shapes.items())
            raise UsageError(
                f"--input-shape: inputs have one shape or equally many, but got {told}; give as many for each"
            )
        return counts.pop() if counts else 1

    def _shapes(self, number: int, batch: int) -> Shapes:
        chosen = {name: shapes[number if len(shapes) > 1 else 0] for name, shapes in self.shapes.items()}
        return {name: tuple(batch if size == "N" else int(size) for size in shape) for name, shape in chosen.items()}


def matrix_shapes(texts: Sequence[str]) -> dict[str, tuple[tuple[Size, ...], ...]]:
    """Read `NAME=1x32,1x128` texts; `N` is the batch.

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
            raise UsageError(
                f"--input-shape: {name} is given twice; several shapes are joined by commas: {name}=1x32,1x128"
            )
        shapes[name] = tuple(_shape(part) for part in sizes.split(","))
    return shapes


def _shape(text: str) -> tuple[Size, ...]:
    first, x, rest = text.partition("x")
    if first == "N":
        return ("N", *(parse_shape(rest) or ())) if x else ("N",)
    return parse_shape(text) or ()
