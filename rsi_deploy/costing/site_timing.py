"""Time every distinct site shape of a model, dense and split at a grid of ranks, within a budget of time.

    pieces --> one cell a shape: dense, and every form at `timing_ranks` --> interleaved blocks --> SiteCost

The loop is that of `bench` (`rsi_deploy.benchmark.blocks`): variants of a shape take turns in shuffled blocks, and the
time goes to the shape whose intervals are widest, until all are as narrow as asked or the time is over. Shapes are
taken in groups, so that their sessions fit into memory together. A shape gets the finest grid of ranks for which its
share of the time allows enough blocks: a grid of which nothing can be said is time lost.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

import graph_passes as gp
from rsi_deploy.benchmark.blocks import Cell, run_cells
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, compare
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.benchmark.variants import Arm, Runtime
from rsi_deploy.core.progress import at
from rsi_deploy.core.types import Floats
from rsi_deploy.costing.cost_table import DETAILS, GROWTH, SiteCost, SplitTime, timing_ranks
from rsi_deploy.costing.site_models import Piece
from rsi_deploy.runtime.placement import Placement, proven_placement
from rsi_deploy.runtime.sessions import make_session

GROUP_BYTES = 2 << 30
WARM_SECONDS = 0.005
TURN_MS = 1.5
"""Timed calls in a turn take about so long, at least one: many short turns see more of a busy machine than few long."""
WANTED_BLOCKS = 1.5 * MIN_BLOCKS
"""That a shape's time is to allow for: fewer than `MIN_BLOCKS` show nothing."""
SESSION_SECONDS = 0.01
"""For making a session of any size."""
RATE, BANDWIDTH = 30e9, 8e9
"""MACs and bytes a second, roughly: they share out the time before anything is measured."""

Splits = tuple[tuple[gp.Form, int], ...]
Progress = Callable[[str, int, int], None]


class ShortTurns(Arm):
    """An arm whose turns are short."""

    def visit(self) -> Floats:
        """One turn: an untimed call that brings caches and workers back, then the timed ones, ms."""
        self.call()
        return time_calls(self.call, max(1, round(TURN_MS / max(self.call_ms, 1e-3)))) / 1e6


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A shape to be timed.

    Attributes:
        piece: of it.
        splits: that it is timed with.
        coarser: what it is timed with instead where time or memory is short, finest first.
    """

    piece: Piece
    splits: Splits
    coarser: tuple[Splits, ...] = ()

    @property
    def bytes(self) -> int:
        """Of its sessions together, about: weights are held twice while they are rearranged."""
        item = np.dtype(self.piece.site.dtype).itemsize
        numbers = self.piece.numbers * (1 + self.share_of(self.splits))
        inputs = sum(int(np.prod(shape)) for _, shape in self.piece.feeds.values())
        return round(item * (2 * self.piece.copies * numbers + 4 * inputs * (1 + len(self.splits))))

    @property
    def effort(self) -> float:
        """Seconds for a block, roughly."""
        numbers = self.piece.copies * self.piece.numbers
        call = max(self.piece.copies * self.piece.macs / RATE, 4 * numbers / BANDWIDTH)
        return (1 + self.share_of(self.splits)) * call + (1 + len(self.splits)) * TURN_MS / 1e3

    def share_of(self, splits: Splits) -> float:
        """Numbers of all these splits together over the weight's."""
        site = self.piece.site
        return sum(site.groups * rank * sum(site.shape(form)) for form, rank in splits) / self.piece.numbers

    def affordable(self, seconds: float, call_ms: float, making: float) -> "Wanted":
        """The shape with the finest grid that can be judged in a time, and that fits into memory; else the coarsest.

        Args:
            seconds: for making its sessions and for its blocks.
            call_ms: of the dense small model.
            making: seconds that the dense small model's session took.
        """
        for splits in (self.splits, *self.coarser):
            shape = replace(self, splits=splits)
            session = making * self.share_of(splits) + SESSION_SECONDS * len(splits)
            if session + WANTED_BLOCKS * shape.block_seconds(call_ms) <= seconds and shape.bytes <= GROUP_BYTES:
                return shape
        return replace(self, splits=(self.splits, *self.coarser)[-1])

    def block_seconds(self, call_ms: float) -> float:
        """Of a block, about, where a call of the dense small model takes so long."""
        return (2 * call_ms * (1 + self.share_of(self.splits)) + TURN_MS * len(self.splits)) / 1e3


def grid_of(site: gp.Site, growths: Mapping[int, float] = GROWTH) -> Splits:
    """Every (form, rank) that a site is timed with: ranks that hold fewer numbers than the weight."""
    found = []
    for form in site.forms:
        rows, columns = site.shape(form)
        limit = site.out_features * site.in_features / (rows + columns)
        largest = min(int(np.ceil(limit)) - 1, rows, columns)
        found += [(form, rank) for rank in timing_ranks(max(largest, 0), growths)]
    return tuple(found)


def time_sites(
    wanted: Sequence[Wanted],
    runtime: Runtime,
    *,
    seconds: float,
    precision: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SiteCost]:
    """The times of every shape.

    Args:
        wanted: the shapes; all different.
        runtime: where they run.
        seconds: for all of them, making the sessions included; every shape gets about as many blocks as can show
            anything, whatever the time.
        precision: relative half width of the intervals that is narrow enough.
        seed: of the order of turns.
        progress: called with (signature, index, count) before each group of shapes.

    Raises:
        UsageError: the provider does not run them.
        ModelError: a small model cannot be run.
    """
    end = time.monotonic() + seconds
    left = sum(shape.effort for shape in wanted)
    done: list[SiteCost] = []
    for group in _groups(wanted):
        if progress is not None:
            progress(group[0].piece.signature, len(done), len(wanted))
        effort = sum(shape.effort for shape in group)
        due = time.monotonic() + max(end - time.monotonic(), 0) * effort / left
        timed, cells = _opened(group, runtime, due)
        least = sum(MIN_BLOCKS * s.block_seconds(c.arms[0].call_ms) for s, c in zip(timed, cells, strict=True))
        share = max(due - time.monotonic(), least)
        if run_cells(cells, seconds=share, precision=precision, seed=seed, progress=_at_share):
            raise KeyboardInterrupt
        done += [_cost(shape, cell, seed) for shape, cell in zip(timed, cells, strict=True)]
        left -= effort
    return done


def _at_share(name: str, share: float) -> None:
    """How much of the time for a group of shapes is over."""
    at(name, round(100 * share), 100)


def _groups(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    group: list[Wanted] = []
    for shape in wanted:
        if group and sum(other.bytes for other in group) + shape.bytes > GROUP_BYTES:
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _opened(group: Sequence[Wanted], runtime: Runtime, due: float) -> tuple[list[Wanted], list[Cell]]:
    """The shapes with the grids that they can be timed with until `due`, and their cells."""
    dense = [_dense(shape, runtime) for shape in group]
    seconds, effort = due - time.monotonic(), sum(shape.effort for shape in group)
    timed, cells = [], []
    for shape, (arm, making) in zip(group, dense, strict=True):
        chosen = shape.affordable(seconds * shape.effort / effort, arm.call_ms, making)
        splits = [_arm(chosen.piece, form, rank, runtime) for form, rank in chosen.splits]
        timed.append(chosen)
        cells.append(Cell(name=shape.piece.signature, arms=[arm, *splits]))
    return timed, cells


def _dense(shape: Wanted, runtime: Runtime) -> tuple[Arm, float]:
    """The dense arm, and the seconds that it took to make."""
    piece = shape.piece
    proven_placement(piece.model(), runtime.provider, piece.inputs(), runtime.threads, runtime.allow_fallback)
    start = time.monotonic()
    arm = _arm(piece, None, 0, runtime)
    return arm, time.monotonic() - start


def _arm(piece: Piece, form: gp.Form | None, rank: int, runtime: Runtime) -> Arm:
    feeds = piece.inputs()
    session = make_session(piece.model(form, rank), runtime.provider, runtime.threads, spin_between_runs=False)
    nothing = Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
    arm = ShortTurns(
        label=f"{form or 'dense'} {rank}", model="", call=runtime.bound(session, feeds).call, placement=nothing
    )
    arm.warm_up(WARM_SECONDS)
    return arm


def _cost(shape: Wanted, cell: Cell, seed: int) -> SiteCost:
    """What the blocks show."""
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


def shapes_of(found: Mapping[str, Piece]) -> dict[str, Wanted]:
    """Signature -> what is to be timed, each shape of a model once; those no rank of which saves are out."""
    shapes: dict[str, Wanted] = {}
    for piece in found.values():
        splits, *coarser = (grid_of(piece.site, growths) for growths in DETAILS)
        if splits and piece.signature not in shapes:
            shapes[piece.signature] = Wanted(piece=piece, splits=splits, coarser=tuple(coarser))
    return shapes
