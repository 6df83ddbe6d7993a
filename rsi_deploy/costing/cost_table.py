"""The cost table: the times of every split of every site on one machine, as written by `rsi-deploy profile`.

    CostTable       one model at one batch, provider and number of threads
      conditions    hardware and software of the measurement
      model         time of the whole dense model, and the accuracy of the table's predictions for split models
      costs         one SiteCost per distinct site shape
        splits      one SplitTime per form and rank of a grid

*Interpolation.* Kernels work in blocks, so times step at multiples of 8, 16 and 32 (a blocked convolution may be slower
at rank 12 than at rank 16). Ranks are therefore divided into classes by the largest of 32, 16, 8 and 1 that divides
them. Every class has its own grid points, which include its first and last rank, and is interpolated separately:

    t(r) = line through the neighbours of r in the grid of its class
"""

import bisect
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
from pydantic import BaseModel, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from graph_passes.forms import FOLDED
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Interval
from rsi_deploy.io.documents import read_document

SCHEMA_VERSION: Literal[1] = 1
GROWTH = {32: 1.7, 16: 2.2, 8: 2.6, 1: 3.5}
"""Class of ranks -> factor from one grid point to the next; ranks that suit the kernels have finer grids."""
DETAILS = (GROWTH, {32: 2.0, 16: 3.0}, {32: 3.2})
"""Grids from fine to coarse. If time is short, a few precise times are worth more than many noisy ones."""
NOISY = 0.25
"""Relative half width of a speedup's interval above which it decides nothing."""


class Conditions(BaseModel, frozen=True, extra="forbid"):
    """The conditions that times depend on besides the model.

    Attributes:
        cpu: name of the processor.
        cores: number of logical cores that the process may use.
        cpu_flags: instruction sets that affect the choice of kernels.
        gpus: names of the GPUs.
        onnxruntime: distribution -> version.
        provider: execution provider with its options, as on the command line.
        threads: threads inside one operator; None for onnxruntime's default.
        scheme: precision of the products, as `rsi_deploy.precision.schemes.Scheme.name` has it.
    """

    cpu: str
    cores: int
    cpu_flags: tuple[str, ...]
    gpus: tuple[str, ...]
    onnxruntime: dict[str, str]
    provider: str
    threads: int | None
    scheme: str = "float32"

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the scheme of float32: documents and cache folders of float32 are the same as without schemes."""
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if (name, value) != ("scheme", "float32")}

    def differences(self, other: "Conditions") -> list[str]:
        """Describe the differences; the value of this object comes first."""
        found = []
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                found.append(f"{name} {_words(mine)} against {_words(theirs)}")
        return found


class SplitTime(BaseModel, frozen=True, extra="forbid"):
    """The time of a site with one split.

    Attributes:
        form: form of the split.
        rank: rank of the split.
        nanoseconds: median time of a call; of the forms "units" and "heads" less what the nodes before save, which may
            be more.
        speedup_interval: 99 % interval of the dense time over this time; of those forms with these nodes.
    """

    form: str
    rank: PositiveInt
    nanoseconds: int
    speedup_interval: Interval

    @model_validator(mode="after")
    def _are_times(self) -> Self:
        low, high = self.speedup_interval
        if self.nanoseconds < 1 and self.form not in FOLDED:
            raise ValueError(f"nanoseconds must be above 0, but are {self.nanoseconds}")
        if not 0 < low <= high:
            raise ValueError(f"speedup_interval must be two numbers above 0 in order, but is {low:g}, {high:g}")
        return self

    @property
    def is_faster(self) -> bool:
        """Return whether the split was shown to be faster than dense."""
        return direction(self.speedup_interval) > 0

    @property
    def half_width(self) -> float:
        """The relative half width of the interval."""
        low, high = self.speedup_interval
        return (high - low) / (high + low)


class SiteCost(BaseModel, frozen=True, extra="forbid"):
    """The times of one site shape.

    Attributes:
        signature: signature of the small model that was timed (`rsi_deploy.costing.site_models`).
        dense_nanoseconds: median time of a dense call.
        blocks: number of turns of every variant.
        half_width: relative half width of the widest interval; None with too few blocks.
        splits: times of splits, sorted by form and rank.
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

    def with_units(self, group: "SiteCost", signature: str) -> "SiteCost":
        """Return these times with those of the form "units", of the site together with the nodes that make its units.

        Args:
            group: times of all these nodes.
            signature: signature of the site and of the group.
        """
        made = [
            s.model_copy(update={"nanoseconds": self.dense_nanoseconds - group.dense_nanoseconds + s.nanoseconds})
            for s in group.splits
        ]
        blocks = min(self.blocks, group.blocks) if self.splits else group.blocks
        widths = [cost.half_width for cost in (self, group)]
        width = None if None in widths else max(w for w in widths if w is not None)
        update = {"signature": signature, "blocks": blocks, "half_width": width, "splits": (*self.splits, *made)}
        return self.model_copy(update=update)

    def nanoseconds(self, form: str, rank: int) -> int | None:
        """Return the time of a split, measured or interpolated; None outside the timed ranks of its form."""
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
        """Return whether a split was shown to be faster; between grid points, both neighbours must be."""
        return self.blocks >= MIN_BLOCKS and all(point.is_faster for point in self._near(form, rank))

    def is_noisy(self, form: str, rank: int) -> bool:
        """Return whether the times are too noisy to tell if a split is faster."""
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
    """The time of the whole dense model.

    Attributes:
        name: name of the model on the command line.
        hash: hash of its weights.
        batch: samples per call.
        inputs: input name -> dtype and shape.
        dense_nanoseconds: median time of a call.
        scale: saving of a whole model over the sum of its sites' savings. It is estimated from measured plans and
            includes the cost of lost fusions; 1 without measured plans.
        checks: the measured plans.
    """

    name: str
    hash: str
    batch: int
    inputs: dict[str, str]
    dense_nanoseconds: PositiveInt
    scale: float = 1.0
    checks: tuple["PlanCheck", ...] = ()


class PlanCheck(BaseModel, frozen=True, extra="forbid"):
    """The predicted and the measured time of one plan.

    Attributes:
        scale: scale of the prediction.
        predicted: predicted share of the dense model's time.
        measured: measured share of the dense model's time.
        measured_interval: 99 % interval of the measured share.
    """

    scale: float
    predicted: float
    measured: float
    measured_interval: Interval


class CostTable(BaseModel, frozen=True, extra="forbid"):
    """The times of one model's sites on one machine.

    Attributes:
        schema_version: version of the file format.
        tool: name and version of the program.
        created: time of creation, UTC, ISO 8601.
        command: command that created the table.
        conditions: conditions of the times.
        model: the whole dense model.
        sites: site name -> signature of its shape.
        untimed: site name -> reason why it has no times and stays dense.
        costs: times by signature.
        seconds: duration of the measurement.
        precision: requested relative half width of the intervals.
        notes: notes for users.
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
        """Return site name -> the times of its shape."""
        costs = {cost.signature: cost for cost in self.costs}
        return {name: costs[signature] for name, signature in self.sites.items() if signature in costs}

    def saving(self, splits: Mapping[str, tuple[str, int]]) -> int:
        """Return the nanoseconds that splits, site name -> (form, rank), save in total, each timed alone."""
        costs, saved = self.by_site(), 0
        for name, (form, rank) in splits.items():
            cost = costs.get(name)
            time = None if cost is None else cost.nanoseconds(form, rank)
            if cost is not None and time is not None:
                saved += cost.dense_nanoseconds - time
        return saved

    def predicted(self, splits: Mapping[str, tuple[str, int]]) -> float:
        """Return the predicted time of the model with these splits, as a share of the dense model's time."""
        return 1 - self.model.scale * self.saving(splits) / self.model.dense_nanoseconds


def block_of(rank: int) -> int:
    """Return the largest of 32, 16, 8 and 1 that divides a rank.

    >>> [block_of(rank) for rank in (64, 48, 24, 20)]
    [32, 16, 8, 1]
    """
    return next(block for block in GROWTH if rank % block == 0)


def timing_ranks(largest: int, growths: Mapping[int, float] = GROWTH) -> tuple[int, ...]:
    """Return the ranks to time up to `largest`: of every class its first, its last, and some between.

    Args:
        largest: largest rank that saves anything.
        growths: one of `DETAILS`. If none of its classes has a rank this small, the best class with one is used.

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
    """Read a table that `rsi-deploy profile` wrote.

    Raises:
        UsageError: there is no such file.
        ModelError: this version cannot read the document; the message gives the first reason.
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
