"""Time every distinct site shape of a model, dense and split at a grid of ranks, within a budget of time.

    pieces --> one cell a shape: dense, and every form at `timing_ranks` --> interleaved blocks --> SiteCost

The loop is that of `bench` (`rsi_deploy.measure.blocks`): variants of a shape take turns in shuffled blocks, and the
time goes to the shape whose intervals are widest, until all are as narrow as asked or the time is over. Shapes are
taken in groups, so that their sessions fit into memory together.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import graph_passes as gp
from rsi_deploy.measure.arms import Arm, Runtime
from rsi_deploy.measure.blocks import Cell, run_cells
from rsi_deploy.measure.cost_table import SiteCost, SplitTime, timing_ranks
from rsi_deploy.measure.placement import Placement, proven_placement
from rsi_deploy.measure.sessions import make_session
from rsi_deploy.measure.site_models import Piece
from rsi_deploy.measure.statistics import Floats, compare
from rsi_deploy.measure.timing import time_calls

GROUP_BYTES = 2 << 30
WARM_SECONDS = 0.005
TURN_MS = 1.5
"""Timed calls in a turn take about so long, at least one: many short turns see more of a busy machine than few long."""
LEAST_SECONDS = 0.2
"""Of measuring for a shape, whatever the budget."""
DENSE = ("dense", 0)

Variant = tuple[str, int]
Progress = Callable[[str, int, int], None]


class ShortTurns(Arm):
    """An arm whose turns are short."""

    def visit(self) -> Floats:
        """One turn: an untimed call that brings caches and workers back, then the timed ones, ms."""
        self.call()
        return time_calls(self.call, max(1, round(TURN_MS / max(self.call_ms, 1e-3)))) / 1e6


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A shape to be timed, and the splits, (form, rank), it is timed with."""

    piece: Piece
    splits: tuple[tuple[gp.Form, int], ...]

    @property
    def bytes(self) -> int:
        """Of its sessions together, about: weights are held twice while they are rearranged."""
        site, item = self.piece.site, np.dtype(self.piece.site.dtype).itemsize
        numbers = site.groups * site.out_features * site.in_features
        for form, rank in self.splits:
            numbers += site.groups * rank * sum(site.shape(form))
        inputs = sum(int(np.prod(shape)) for _, shape in self.piece.feeds.values())
        return item * (2 * self.piece.copies * numbers + 4 * inputs * (1 + len(self.splits)))


def grid_of(site: gp.Site) -> tuple[tuple[gp.Form, int], ...]:
    """Every (form, rank) that a site is timed with: ranks that hold fewer numbers than the weight."""
    found = []
    for form in site.forms:
        rows, columns = site.shape(form)
        limit = site.out_features * site.in_features / (rows + columns)
        largest = min(int(np.ceil(limit)) - 1, rows, columns)
        found += [(form, rank) for rank in timing_ranks(max(largest, 0))]
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
        seconds: for all of them, making the sessions included; every shape gets at least a block.
        precision: relative half width of the intervals that is narrow enough.
        seed: of the order of turns.
        progress: called with (signature, index, count) before each group of shapes.

    Raises:
        UsageError: the provider does not run them.
        ModelError: a small model cannot be run.
    """
    end = time.monotonic() + seconds
    left = sum(1 + len(shape.splits) for shape in wanted)
    done: list[SiteCost] = []
    for group in _groups(wanted):
        if progress is not None:
            progress(group[0].piece.signature, len(done), len(wanted))
        arms = sum(1 + len(shape.splits) for shape in group)
        due = time.monotonic() + max(end - time.monotonic(), 0) * arms / left
        cells = [Cell(name=shape.piece.signature, arms=_arms(shape, runtime)) for shape in group]
        share = max(due - time.monotonic(), LEAST_SECONDS * len(group))
        if run_cells(cells, seconds=share, precision=precision, seed=seed):
            raise KeyboardInterrupt
        done += [_cost(shape, cell, seed) for shape, cell in zip(group, cells, strict=True)]
        left -= arms
    return done


def _groups(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    group: list[Wanted] = []
    for shape in wanted:
        if group and sum(other.bytes for other in group) + shape.bytes > GROUP_BYTES:
            yield group
            group = []
        group.append(shape)
    if group:
        yield group


def _arms(shape: Wanted, runtime: Runtime) -> list[Arm]:
    piece = shape.piece
    feeds = piece.inputs()
    arms: list[Arm] = []
    for form, rank in (DENSE, *shape.splits):
        model = piece.model(None if form == "dense" else form, rank)  # type: ignore[arg-type]
        if form == "dense":
            proven_placement(model, runtime.provider, feeds, runtime.threads, runtime.allow_fallback)
        session = make_session(model, runtime.provider, runtime.threads, spin_between_runs=False)
        bound = runtime.bound(session, feeds)
        nothing = Placement(provider_nodes={}, memcpy_nodes=0, nodes={})
        arms.append(ShortTurns(label=f"{form} {rank}", model="", call=bound.call, placement=nothing))
        arms[-1].warm_up(WARM_SECONDS)
    return arms


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
        splits = grid_of(piece.site)
        if splits and piece.signature not in shapes:
            shapes[piece.signature] = Wanted(piece=piece, splits=splits)
    return shapes
