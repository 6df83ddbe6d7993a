"""The loop: arms interleaved in shuffled blocks, and the time spent on the configurations that need it.

    block    every arm of a cell once, in an order shuffled by a seeded generator
    visit    one arm's turn in a block: an untimed call where calls are short, then the timed ones
    look     after 8 blocks, 12, 18, 27...: how wide are the cell's intervals?

After a first block for every cell, and for every cell 20 blocks and a second (a moment is no sample of a machine), the
one whose intervals are widest is next, until all are narrow enough or the time is over. See `statistics` for why
looking at widths leaves the claims honest.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rsi_deploy.benchmark.statistics import ENOUGH_BLOCKS, MIN_BLOCKS, half_width
from rsi_deploy.benchmark.variants import Arm
from rsi_deploy.core.types import Floats

MIN_SECONDS = 1.0

Progress = Callable[[str, float], None]
"""Told which cell is at work and the share of the time that is over."""


@dataclass(kw_only=True)
class Cell:
    """One configuration while it is measured.

    Attributes:
        name: for progress.
        arms: on equal inputs.
        seconds: spent in its blocks.
        width: relative half width of its widest interval at the last look; infinite before.
        look_at: number of blocks of the next look.
        precise: narrow enough, and done.
    """

    name: str
    arms: list[Arm]
    seconds: float = 0.0
    width: float = float("inf")
    look_at: int = MIN_BLOCKS
    precise: bool = False
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def blocks(self) -> int:
        """Whole blocks."""
        return len(self.arms[-1].visits) if self.arms else 0

    def medians(self) -> Floats:
        """The median of each visit: ms, `(arms, B)`."""
        kept = [arm.visits[: self.blocks] for arm in self.arms]  # Ctrl-C may leave one arm a visit ahead
        return np.asarray([[np.median(times) for times in visits] for visits in kept], np.float64)

    def run_block(self) -> None:
        """Every arm once; an interrupted block leaves nothing behind."""
        start = time.monotonic()
        visits = {int(index): self.arms[index].visit() for index in self._rng.permutation(len(self.arms))}
        for index, arm in enumerate(self.arms):
            arm.visits.append(visits[index])
        self.seconds += time.monotonic() - start

    def is_new(self, least_seconds: float) -> bool:
        """Whether it has too little to count as narrow, however narrow it is."""
        return self.blocks < ENOUGH_BLOCKS or self.seconds < least_seconds

    def look(self, precision: float, least_seconds: float, seed: int) -> None:
        """Judge the intervals, and set the next look."""
        self.width = half_width(self.medians(), seed)
        self.precise = self.width <= precision and not self.is_new(least_seconds)
        self.look_at = self.blocks + self.blocks // 2


def run_cells(
    cells: Sequence[Cell], *, seconds: float, precision: float, seed: int, progress: Progress | None = None
) -> bool:
    """Fill the arms' visits: at least one block a cell, whatever the time.

    Args:
        cells: warmed up.
        seconds: for all of them together.
        precision: relative half width at which a cell is done.
        seed: of the order of arms.
        progress: called before each turn of a cell.

    Returns:
        Whether it was interrupted (Ctrl-C); whole blocks are kept.
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
            cell.width = half_width(cell.medians(), seed) if cell.blocks else cell.width
        return True
    finally:
        if collecting:
            gc.enable()
    return False


def _turn(cell: Cell, end: float) -> None:
    """Blocks until the next look or the end, at least one."""
    cell.run_block()
    while cell.blocks < cell.look_at and time.monotonic() < end:
        cell.run_block()
