"""The measuring loop: variants interleaved in shuffled blocks, with more time for cells that need it.

    block    every variant of a cell once, in an order shuffled by a seeded generator
    visit    the turn of one variant in a block: an untimed call if calls are short, then the timed ones
    look     after 8, 12, 18, 27... blocks: how wide are the intervals of the cell?

Every cell first gets one block, then 20 blocks and a second. After that the cell with the widest intervals is next,
until all intervals are narrow enough or the time is over. `statistics` explains why this rule does not bias claims.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rsi_deploy.benchmark.statistics import ENOUGH_BLOCKS, MIN_BLOCKS, half_width
from rsi_deploy.benchmark.variants import Variant
from rsi_deploy.core.types import Floats

MIN_SECONDS = 1.0

Progress = Callable[[str, float], None]
"""Function that is called with the name of the current cell and the share of the time that is over."""


@dataclass(kw_only=True)
class Cell:
    """One configuration during its measurement.

    Attributes:
        name: name for progress reports.
        variants: variants with equal inputs.
        seconds: time spent in its blocks.
        width: relative half width of its widest interval at the last look; infinite before the first.
        look_at: number of blocks at the next look.
        precise: whether the intervals are narrow enough.
    """

    name: str
    variants: list[Variant]
    seconds: float = 0.0
    width: float = float("inf")
    look_at: int = MIN_BLOCKS
    precise: bool = False
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def blocks(self) -> int:
        """The number of complete blocks."""
        return len(self.variants[-1].visits) if self.variants else 0

    def medians(self) -> Floats:
        """Return the median of each visit in ms, `(variants, B)`."""
        kept = [
            variant.visits[: self.blocks] for variant in self.variants
        ]  # Ctrl-C may leave one variant a visit ahead
        return np.asarray([[np.median(times) for times in visits] for visits in kept], np.float64)

    def run_block(self) -> None:
        """Run every variant once; an interrupted block is dropped."""
        start = time.monotonic()
        visits = {int(index): self.variants[index].visit() for index in self._rng.permutation(len(self.variants))}
        for index, variant in enumerate(self.variants):
            variant.visits.append(visits[index])
        self.seconds += time.monotonic() - start

    def is_new(self, least_seconds: float) -> bool:
        """Return whether the cell has too few blocks or seconds to be precise."""
        return self.blocks < ENOUGH_BLOCKS or self.seconds < least_seconds

    def widest(self, seed: int) -> float:
        """Return the relative half width of the widest interval; infinite without enough blocks."""
        return half_width(self.medians(), seed) if self.blocks else float("inf")

    def look(self, precision: float, least_seconds: float, seed: int) -> None:
        """Update the width of the intervals, and schedule the next look."""
        self.width = self.widest(seed)
        self.precise = self.width <= precision and not self.is_new(least_seconds)
        self.look_at = self.blocks + self.blocks // 2


def run_cells(
    cells: Sequence[Cell], *, seconds: float, precision: float, seed: int, progress: Progress | None = None
) -> bool:
    """Measure cells; each gets at least one block.

    Args:
        cells: cells with warm variants.
        seconds: total time.
        precision: relative half width at which a cell is precise.
        seed: random seed for the order of variants.
        progress: function that is called before each turn of a cell.

    Returns:
        Whether the user interrupted (Ctrl-C); complete blocks are kept.
    """
    for number, cell in enumerate(cells):
        cell._rng = np.random.default_rng([seed, number, *b"order"])
    least = min(MIN_SECONDS, seconds / (2 * len(cells)))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.monotonic()
    try:
        while waiting := [cell for cell in cells if not cell.precise]:
            spent = time.monotonic() - start
            if spent >= seconds and all(cell.blocks for cell in cells):
                return False
            cell = max(waiting, key=lambda cell: (not cell.blocks, cell.is_new(least), cell.width))
            if progress is not None:
                progress(cell.name, min(1.0, spent / seconds))
            _turn(cell, start + seconds)
            cell.look(precision, least, seed)
    except KeyboardInterrupt:
        for cell in cells:
            cell.width = cell.widest(seed)
        return True
    finally:
        if collecting:
            gc.enable()
    return False


def _turn(cell: Cell, end: float) -> None:
    """Run at least one block, until the next look or the end."""
    cell.run_block()
    while cell.blocks < cell.look_at and time.monotonic() < end:
        cell.run_block()
