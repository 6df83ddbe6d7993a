"""Time every distinct site shape of a model, dense and split at a grid of ranks, within a time budget.

    pieces --> one cell per shape: dense, and every form at `timing_ranks` --> interleaved blocks --> SiteCost

The loop is that of `bench` (`rsi_deploy.benchmark.blocks`): the variants of a shape take turns in shuffled blocks, and
the shape with the widest intervals is measured next, until all intervals are narrow enough or the time is over. Shapes
are timed in groups whose sessions fit into memory together. Each shape gets the finest grid of ranks for which its
share of the time allows enough blocks.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

import graph_passes as gp
from graph_passes.forms import FOLDED, rank_limit
from rsi_deploy.benchmark.blocks import Cell, run_cells
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, compare
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.benchmark.variants import Runtime, Variant
from rsi_deploy.core.progress import at
from rsi_deploy.core.types import Floats
from rsi_deploy.costing.cost_table import DETAILS, GROWTH, SiteCost, SplitTime, timing_ranks
from rsi_deploy.costing.site_models import Piece
from rsi_deploy.runtime.placement import Placement, proven_placement
from rsi_deploy.runtime.sessions import make_session

GROUP_BYTES = 2 << 30
WARM_SECONDS = 0.005
TURN_MS = 1.5
"""Approximate time of the timed calls in a turn. Many short turns sample a busy machine better than few long ones."""
PLANNED_BLOCKS = 1.5 * MIN_BLOCKS
"""Number of blocks that the time of a shape must allow; fewer than `MIN_BLOCKS` show nothing."""
SESSION_SECONDS = 0.01
"""Approximate time to create a session of any size; a small model in low precision takes as long as the dense one."""
RATE, BANDWIDTH = 30e9, 8e9
"""Rough MACs and bytes per second, to divide the time before anything is measured."""

Splits = tuple[tuple[gp.Form, int], ...]
Progress = Callable[[str, int, int], None]


class ShortTurns(Variant):
    """A variant with short turns."""

    def visit(self) -> Floats:
        """Run an untimed call that warms caches and workers, then the timed ones, and return their times in ms."""
        self.call()
        return time_calls(self.call, max(1, round(TURN_MS / max(self.call_ms, 1e-3)))) / 1e6


@dataclass(frozen=True, kw_only=True)
class TimedShape:
    """A site shape to time.

    Attributes:
        piece: piece of a site with this shape.
        splits: splits to time.
        coarser: alternatives to `splits` for short time or memory, from fine to coarse.
    """

    piece: Piece
    splits: Splits
    coarser: tuple[Splits, ...] = ()

    @property
    def bytes(self) -> int:
        """The approximate memory of its sessions, which hold weights twice while rearranging them."""
        item = np.dtype(self.piece.site.dtype).itemsize
        numbers = self.piece.numbers * (1 + self.share_of(self.splits))
        inputs = sum(int(np.prod(shape)) for _, shape in self.piece.feeds.values())
        return round(item * (2 * self.piece.copies * numbers + 4 * inputs * (1 + len(self.splits))))

    @property
    def effort(self) -> float:
        """The approximate seconds of a block."""
        numbers = self.piece.copies * self.piece.numbers
        call = max(self.piece.copies * self.piece.macs / RATE, 4 * numbers / BANDWIDTH)
        return (1 + self.share_of(self.splits)) * call + (1 + len(self.splits)) * TURN_MS / 1e3

    def share_of(self, splits: Splits) -> float:
        """Return the parameters of all these splits over those of the weight."""
        return sum(self.piece.numbers_of(form, rank) for form, rank in splits) / self.piece.numbers

    def affordable(self, seconds: float, call_ms: float, making: float) -> "TimedShape":
        """Return the shape with the finest grid that fits into a time and into memory, or with the coarsest grid.

        Args:
            seconds: time for its sessions and blocks.
            call_ms: time of a call of the dense small model.
            making: seconds that creating the session of the dense small model took.
        """
        for splits in (self.splits, *self.coarser):
            shape = replace(self, splits=splits)
            each = SESSION_SECONDS if self.piece.lower is None else making
            session = making * self.share_of(splits) + each * len(splits)
            if session + PLANNED_BLOCKS * shape.block_seconds(call_ms) <= seconds and shape.bytes <= GROUP_BYTES:
                return shape
        return replace(self, splits=(self.splits, *self.coarser)[-1])

    def block_seconds(self, call_ms: float) -> float:
        """Return the approximate seconds of a block, from the time of a call of the dense small model."""
        return (2 * call_ms * (1 + self.share_of(self.splits)) + TURN_MS * len(self.splits)) / 1e3


def grid_of(piece: Piece, growths: Mapping[int, float] = GROWTH) -> Splits:
    """Return every (form, rank) to time at a site; all have fewer parameters than the weight."""
    found: list[tuple[gp.Form, int]] = []
    site = piece.site
    for form in piece.forms:
        if form in FOLDED and site.units is not None:
            counts = timing_ranks(site.units.count - 1, growths)
            found += [(form, count * site.units.run) for count in counts]
            continue
        rows, columns = site.shape(form)
        limit = site.out_features * site.in_features / (rows + columns)
        limit = rank_limit(form, rows, columns) if form == "pivoted" else limit
        largest = min(int(np.ceil(limit)) - 1, rows, columns)
        found += [(form, rank) for rank in timing_ranks(max(largest, 0), growths)]
    return tuple(found)


def time_sites(
    shapes: Sequence[TimedShape],
    runtime: Runtime,
    *,
    seconds: float,
    precision: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SiteCost]:
    """Time shapes.

    Args:
        shapes: distinct shapes.
        runtime: provider and threads.
        seconds: total time, including the creation of sessions. Every shape gets about `MIN_BLOCKS` blocks even if
            that takes longer.
        precision: relative half width of intervals that are narrow enough.
        seed: random seed for the order of turns.
        progress: function that is called with (signature, index, count) before each group of shapes.

    Raises:
        UsageError: the provider does not run the small models.
        ModelError: a small model cannot be run.
    """
    end = time.monotonic() + seconds
    left = sum(shape.effort for shape in shapes)
    done: list[SiteCost] = []
    for group in _groups(shapes):
        if progress is not None:
            progress(group[0].piece.signature, len(done), len(shapes))
        effort = sum(shape.effort for shape in group)
        due = time.monotonic() + max(end - time.monotonic(), 0) * effort / left
        timed, cells = _opened(group, runtime, due)
        least = sum(MIN_BLOCKS * s.block_seconds(c.variants[0].call_ms) for s, c in zip(timed, cells, strict=True))
        share = max(due - time.monotonic(), least)
        if run_cells(cells, seconds=share, precision=precision, seed=seed, progress=_at_share):
            raise KeyboardInterrupt
        done += [_cost(shape, cell, seed) for shape, cell in zip(timed, cells, strict=True)]
        left -= effort
    return done


def _at_share(name: str, share: float) -> None:
    """Report the share of the time for a group of shapes that is over."""
    at(name, round(100 * share), 100)


def _groups(shapes: Sequence[TimedShape]) -> Iterator[list[TimedShape]]:
    group: list[TimedShape] = []
    for shape in shapes:
        if group and sum(other.bytes for other in group) + shape.bytes > GROUP_BYTES:
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _opened(group: Sequence[TimedShape], runtime: Runtime, due: float) -> tuple[list[TimedShape], list[Cell]]:
    """Choose the grids that can be timed until `due`, and return the shapes with their cells."""
    dense = [_dense(shape, runtime) for shape in group]
    seconds, effort = due - time.monotonic(), sum(shape.effort for shape in group)
    timed, cells = [], []
    for shape, (variant, making) in zip(group, dense, strict=True):
        chosen = shape.affordable(seconds * shape.effort / effort, variant.call_ms, making)
        splits = [_variant(chosen.piece, form, rank, runtime) for form, rank in chosen.splits]
        timed.append(chosen)
        cells.append(Cell(name=shape.piece.signature, variants=[variant, *splits]))
    return timed, cells


def _dense(shape: TimedShape, runtime: Runtime) -> tuple[Variant, float]:
    """Return the dense variant, and the seconds to create it."""
    piece = shape.piece
    proven_placement(piece.model(), runtime.provider, piece.inputs(), runtime.threads, runtime.allow_fallback)
    start = time.monotonic()
    variant = _variant(piece, None, 0, runtime)
    return variant, time.monotonic() - start


def _variant(piece: Piece, form: gp.Form | None, rank: int, runtime: Runtime) -> Variant:
    feeds = piece.inputs()
    session = make_session(piece.model(form, rank), runtime.provider, runtime.threads, spin_between_runs=False)
    nothing = Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
    variant = ShortTurns(
        label=f"{form or 'dense'} {rank}", model="", call=runtime.bound(session, feeds).call, placement=nothing
    )
    variant.warm_up(WARM_SECONDS)
    return variant


def _cost(shape: TimedShape, cell: Cell, seed: int) -> SiteCost:
    """Return the times that the blocks show."""
    blocks, copies = cell.medians(), shape.piece.copies
    dense = float(np.median(blocks[0]))
    times = []
    for row, (form, rank) in zip(blocks[1:], shape.splits, strict=True):
        speedup, ends = compare(blocks[0], row, seed)
        nanoseconds = round(1e6 * dense / speedup / copies)
        times.append(SplitTime(form=form, rank=rank, nanoseconds=nanoseconds, speedup_interval=ends))
    return SiteCost(
        signature=cell.name,
        dense_nanoseconds=round(1e6 * dense / copies),
        blocks=cell.blocks,
        half_width=cell.width if np.isfinite(cell.width) else None,
        splits=tuple(times),
    )


def shapes_of(found: Mapping[str, Piece]) -> dict[str, TimedShape]:
    """Return signature -> shape to time, without shapes that no rank makes smaller."""
    shapes: dict[str, TimedShape] = {}
    for piece in (each for own in found.values() for each in (own, own.group) if each is not None):
        splits, *coarser = (grid_of(piece, growths) for growths in DETAILS)
        if splits and piece.signature not in shapes:
            shapes[piece.signature] = TimedShape(piece=piece, splits=splits, coarser=tuple(coarser))
    return shapes
