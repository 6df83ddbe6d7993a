"""What every split of every site costs in time on one machine, as a typed document: `rsi-deploy profile` writes it.

    CostTable       one model at one batch, provider and number of threads
      conditions    the hardware and software that the times hold for
      model         the whole dense model's time, and how well the sum of the table foretells a split one's
      costs         one SiteCost a distinct site shape
        splits      one SplitTime a form and rank of a grid

*Between the grid.* Kernels work in blocks, so a time steps at multiples of 8, 16 and 32 (a blocked convolution at rank
12 may well be slower than at rank 16). Ranks are therefore told apart by the largest of 32, 16, 8 and 1 that divides
them, every class has grid points of its own, its first and last rank among them, and is interpolated by itself:

    t(r) = line through the neighbours of r in the grid that belong to the same class
"""

import bisect
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import pydantic
from pydantic import BaseModel, PositiveInt, model_validator

from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Interval
from rsi_deploy.io.documents import read_document

SCHEMA_VERSION: Literal[1] = 1
GROWTH = {32: 1.7, 16: 2.2, 8: 2.6, 1: 3.5}
"""Blocks of ranks, and the factor from one grid point of a class to the next: good ranks are looked at more closely."""
DETAILS = (GROWTH, {32: 2.0, 16: 3.0}, {32: 3.2})
"""Grids, finest first: with little time for a large site, few good ranks that are told apart are worth more than many
that are not."""
NOISY = 0.25
"""Relative half width of a speedup's interval beyond which nothing is decided by it."""


class Conditions(BaseModel, frozen=True, extra="forbid"):
    """What times depend on besides the model; times of other conditions are no times of these.

    Attributes:
        cpu: the processor's name.
        cores: logical cores that the process may use.
        cpu_flags: instruction sets that decide which kernels run.
        gpus: names.
        onnxruntime: distribution -> version.
        provider: as it would be typed, options included.
        threads: inside one operator; None is onnxruntime's default.
    """

    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    gpus: tuple[str, ...]
    onnxruntime: dict[str, str]
    provider: str
    threads: int | None

    def differences(self, other: "Conditions") -> list[str]:
        """What differs, in words: this one's first."""
        found = []
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {_words(mine)} against {_words(theirs)}")
        return found


class SplitTime(BaseModel, frozen=True, extra="forbid"):
    """A site's time when it is split.

    Attributes:
        form: of the split.
        rank: of the split.
        nanoseconds: a call's median.
        speedup_interval: 99 % interval of dense time over this one.
    """

    form: str
    rank: PositiveInt
    nanoseconds: PositiveInt
    speedup_interval: Interval

    @model_validator(mode="after")
    def _ends_in_order(self) -> Self:
        low, high = self.speedup_interval
        if not 0 < low <= high:
            raise ValueError(f"speedup_interval must be two numbers above 0 in order, but is {low:g}, {high:g}")
        return self

    @property
    def is_faster(self) -> bool:
        """Whether it was shown to be faster than dense."""
        return direction(self.speedup_interval) > 0

    @property
    def half_width(self) -> float:
        """Of the interval, relative."""
        low, high = self.speedup_interval
        return (high - low) / (high + low)


class SiteCost(BaseModel, frozen=True, extra="forbid"):
    """The times of one site shape.

    Attributes:
        signature: of the small model that was timed (`rsi_deploy.costing.site_models`).
        dense_nanoseconds: a call's median.
        blocks: turns that every variant took.
        half_width: of the widest interval, relative; None with too few blocks.
        splits: by form, then rank.
    """

    signature: str
    dense_nanoseconds: PositiveInt
    blocks: int
    half_width: float | None
    splits: tuple[SplitTime, ...]

    @pydantic.model_validator(mode="after")
    def _ranks_rise(self) -> "SiteCost":
        for form in {split.form for split in self.splits}:
            ranks = [split.rank for split in self.splits if split.form == form]
            if ranks != sorted(set(ranks)):
                raise ValueError(f"the ranks of form {form} must rise, but are {ranks[:20]}")
        return self

    def nanoseconds(self, form: str, rank: int) -> int | None:
        """The time of a split, measured or interpolated; None where the form was not timed so far."""
        points = [s for s in self.splits if s.form == form and block_of(s.rank) == block_of(rank)]
        if not points or not points[0].rank <= rank <= points[-1].rank:
            return None
        place = bisect.bisect_left([point.rank for point in points], rank)
        above = points[place]
        if above.rank == rank:
            return above.nanoseconds
        below = points[place - 1]
        share = (rank - below.rank) / (above.rank - below.rank)
        return round(below.nanoseconds + share * (above.nanoseconds - below.nanoseconds))

    def is_faster(self, form: str, rank: int) -> bool:
        """Whether a split was shown to be faster; between grid points, whether both neighbours were."""
        return self.blocks >= MIN_BLOCKS and all(point.is_faster for point in self._near(form, rank))

    def is_noisy(self, form: str, rank: int) -> bool:
        """Whether the measurement cannot tell."""
        return self.blocks < MIN_BLOCKS or any(point.half_width > NOISY for point in self._near(form, rank))

    def _near(self, form: str, rank: int) -> list[SplitTime]:
        points = [s for s in self.splits if s.form == form and block_of(s.rank) == block_of(rank)]
        place = bisect.bisect_left([point.rank for point in points], rank)
        exact = place < len(points) and points[place].rank == rank
        near = points[place : place + 1] if exact else points[max(place - 1, 0) : place + 1]
        if not near or not points[0].rank <= rank <= points[-1].rank:
            raise KeyError(f"{form} at rank {rank} was not timed")
        return near


class ModelTime(BaseModel, frozen=True, extra="forbid"):
    """The whole dense model.

    Attributes:
        name: as typed.
        hash: of its weights.
        batch: samples a call.
        inputs: input name -> dtype and shape.
        dense_nanoseconds: a call's median.
        scale: by what the saving of a whole model is that of its sites: from plans that were measured as a whole, so
            that fusions which a split destroys count. 1 where none was.
        checks: those plans.
    """

    name: str
    hash: str
    batch: int
    inputs: dict[str, str]
    dense_nanoseconds: PositiveInt
    scale: float = 1.0
    checks: tuple["PlanCheck", ...] = ()


class PlanCheck(BaseModel, frozen=True, extra="forbid"):
    """One plan, foretold from the table and measured as a whole model beside the dense one.

    Attributes:
        scale: that the prediction was made with.
        predicted: share of the dense model's time.
        measured: likewise.
        measured_interval: 99 % interval of it.
    """

    scale: float
    predicted: float
    measured: float
    measured_interval: Interval


class CostTable(BaseModel, frozen=True, extra="forbid"):
    """The times of one model's sites on one machine.

    Attributes:
        schema_version: of this document.
        tool: name and version.
        created: when, UTC, ISO 8601.
        command: that made it.
        conditions: what the times hold for.
        model: the whole dense model.
        sites: site name -> signature of its shape.
        untimed: site name -> why there are no times of it; it stays dense.
        costs: one a signature.
        seconds: that it took.
        precision: relative half width of the intervals that was asked for.
        notes: what a reader must know.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    created: datetime.datetime
    command: str
    conditions: Conditions
    model: ModelTime
    sites: dict[str, str]
    untimed: dict[str, str]
    costs: tuple[SiteCost, ...]
    seconds: float
    precision: float
    notes: tuple[str, ...] = ()

    def by_site(self) -> dict[str, SiteCost]:
        """Site name -> the times of its shape."""
        costs = {cost.signature: cost for cost in self.costs}
        return {name: costs[signature] for name, signature in self.sites.items() if signature in costs}

    def saving(self, splits: Mapping[str, tuple[str, int]]) -> int:
        """Nanoseconds that these splits, site name -> (form, rank), save together, each timed alone."""
        costs, saved = self.by_site(), 0
        for name, (form, rank) in splits.items():
            cost = costs.get(name)
            time = None if cost is None else cost.nanoseconds(form, rank)
            if cost is not None and time is not None:
                saved += cost.dense_nanoseconds - time
        return saved

    def predicted(self, splits: Mapping[str, tuple[str, int]]) -> float:
        """The time of the model with these splits as a share of the dense one's."""
        return 1 - self.model.scale * self.saving(splits) / self.model.dense_nanoseconds


def block_of(rank: int) -> int:
    """The largest of 32, 16, 8 and 1 that divides a rank.

    >>> [block_of(rank) for rank in (64, 48, 24, 20)]
    [32, 16, 8, 1]
    """
    return next(block for block in GROWTH if rank % block == 0)


def timing_ranks(largest: int, growths: Mapping[int, float] = GROWTH) -> tuple[int, ...]:
    """The ranks that are timed, of those up to `largest`: of every class its first, its last, and some between.

    Args:
        largest: rank that saves anything.
        growths: of `DETAILS`; where none of its classes has such a small rank, the best class that has.

    >>> timing_ranks(40)
    (1, 4, 8, 14, 16, 24, 32, 39, 40)
    >>> timing_ranks(460, DETAILS[2]), timing_ranks(20, DETAILS[2])
    ((32, 128, 416, 448), (16,))
    """
    if largest >= 1 and all(block > largest for block in growths):
        growths = {next(block for block in GROWTH if block <= largest): 2.0}
    chosen: set[int] = set()
    for block, growth in growths.items():
        members = [rank for rank in range(block, largest + 1, block) if block_of(rank) == block]
        wanted = 0.0
        for rank in members:
            if rank >= wanted or rank == members[-1]:
                chosen.add(rank)
                wanted = rank * growth
    return tuple(sorted(chosen))


def read_cost_table(path: str | Path) -> CostTable:
    """A table that `rsi-deploy profile` wrote.

    Raises:
        UsageError: no such file.
        ModelError: a document that this version cannot read, and the first reason.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--cost {path}: no such file; make one with rsi-deploy profile MODEL -o {path}")
    try:
        return CostTable.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(
            f"{path} is no cost table of schema version {SCHEMA_VERSION}: {where}: {first['msg']}; make it again with "
            f"rsi-deploy profile"
        ) from error


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "the default" if value is None else str(value)
