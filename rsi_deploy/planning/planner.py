"""Planners: the decision for every site, a rank or "dense" with a reason, from its name and shape."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graph_passes.records import AnyForm
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.sites import break_even_rank


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """The value of `--rank`: either an absolute `rank` or a `ratio` of full rank in (0, 1]."""

    rank: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: "str | int | RankSpec") -> "RankSpec":
        """Parse `64` (a rank) or `40%` (the ratio of the paper).

        Raises:
            UsageError: anything else, for example a fraction, which could mean either; the message gives the spelling.

        Example:
            >>> RankSpec.parse("40%").resolve(1000, 300)
            120
            >>> RankSpec.parse(64).resolve(1000, 300)
            64
        """
        if isinstance(text, RankSpec):
            return text
        text = str(text).strip()
        if re.fullmatch(r"[+-]?\d+", text):
            if int(text) < 1:
                raise UsageError(f"--rank must be at least 1, but got {text!r}")
            return cls(rank=int(text))
        if number := re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*%", text):
            percent = float(number[1])
            if not 0 < percent <= 100:
                raise UsageError(f"--rank as a ratio must lie in (0 %, 100 %], but got {text!r}")
            return cls(ratio=percent / 100)
        if re.fullmatch(r"[+-]?\d*\.\d*(e[+-]?\d+)?", text) and any(c.isdigit() for c in text):
            percent = float(text) * 100
            hint = (
                f"write --rank {percent:g}%"
                if 0 < percent <= 100
                else "write a rank such as 64, or a ratio such as 40%"
            )
            raise UsageError(f"--rank {text} could be a rank or a ratio: {hint}")
        raise UsageError(f"--rank must be a rank such as 64 or a ratio such as 40%, but got {text!r}")

    def resolve(self, out_features: int, in_features: int) -> int:
        """Return the rank at a site, `ceil(ratio * min(out, in))` for a ratio. A rank may exceed the full rank."""
        if self.rank is not None:
            return self.rank
        assert self.ratio is not None
        return max(1, math.ceil(round(self.ratio * min(out_features, in_features), 9)))

    def __str__(self) -> str:
        return str(self.rank) if self.rank is not None else f"{100 * (self.ratio or 0):g}%"


@dataclass(frozen=True, kw_only=True)
class MaxError:
    """The value of `--max-error`: every site gets the smallest rank whose error is at most `value`.

    Attributes:
        value: bound on the error.
        normalized: whether the error is normalized, `||W - left right||_2 / s_{rank+1}(W)`, or relative,
            `||W - left right||_2 / ||W||_2`.
    """

    value: float
    normalized: bool

    @classmethod
    def parse(cls, text: "str | MaxError") -> "MaxError":
        """Parse `5%` (of the weight's norm) or `1.1x` (times the best error of that rank).

        Raises:
            UsageError: anything else, or a value outside (0 %, 100 %) or not above 1x.

        Example:
            >>> MaxError.parse("5%"), MaxError.parse("1.1x")
            (MaxError(value=0.05, normalized=False), MaxError(value=1.1, normalized=True))
        """
        if isinstance(text, MaxError):
            return text
        number = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([%x])", str(text).strip())
        if number is None:
            raise UsageError(
                f"--max-error takes a share of the weight's norm such as 5%, or a multiple of the best error of that "
                f"rank such as 1.1x, but got {text!r}"
            )
        value, normalized = float(number[1]), number[2] == "x"
        if not (value > 1 if normalized else 0 < value < 100):
            raise UsageError(
                f"--max-error must lie {'above 1x' if normalized else 'between 0% and 100%'}, got {text!r}"
            )
        return cls(value=value if normalized else value / 100, normalized=normalized)

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.normalized else f"{100 * self.value:g}%"


def rank_spec(rank: "str | int | RankSpec | None", max_error: str | MaxError | None) -> RankSpec | MaxError:
    """Parse the one of `--rank` and `--max-error` that is set.

    Raises:
        UsageError: both or neither are set, or the value cannot be parsed.
    """
    if (rank is None) == (max_error is None):
        raise UsageError("give exactly one of --rank and --max-error; type for example --rank 25%")
    return RankSpec.parse(rank) if rank is not None else MaxError.parse(max_error or "")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision for one site.

    Attributes:
        rank: rank of the split; None for dense.
        reason: reason for users.
        form: form of the split; "first" for the usual form of the operation.
        bits: bits in which the weight, or both factors, are stored.
        repair: rank of the repair of a rounded weight; 0 for none.
    """

    rank: int | None
    reason: str
    form: AnyForm = "first"
    bits: int = 32
    repair: int = 0


class SitePlanner(Protocol):
    """A planner that decides every site."""

    @property
    def always_split(self) -> bool:
        """Return whether sites are split even if nothing is saved."""

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Decide one site with a weight of shape `(out, in)`."""

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Raise an error if the settings do not fit these sites `(name, out, in)`."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The sites to consider, as globs on site names.

    Attributes:
        include: sites to include; empty for all.
        exclude: sites to exclude, also if they are included.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def refusal(self, name: str) -> str:
        """Return the reason why a site is excluded, or ""."""
        if self.include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return "not matched by --include"
        if pattern := next((p for p in self.exclude if fnmatch.fnmatchcase(name, p)), None):
            return f"excluded by --exclude {pattern}"
        return ""

    def check(self, names: Sequence[str]) -> None:
        """Check that every glob matches a site.

        Raises:
            UsageError: a glob matches no site; the message names some sites.
        """
        for option, patterns in (("--include", self.include), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    some = ", ".join(names[:4])
                    raise UsageError(
                        f"{option} {pattern!r} matches none of the {len(names)} sites ({some}, ...)"
                        f"; rsi-deploy inspect lists them"
                    )


@dataclass(frozen=True, kw_only=True)
class FixedPlanner:
    """A planner with a stored decision for every site, from a budget or from a plan file.

    Attributes:
        decisions: decisions by site name.
        filters: filters of the request, for the reasons of excluded sites.
        otherwise: reason for a site without a decision, which stays dense.
        always_split: whether sites are split even if nothing is saved.
    """

    decisions: Mapping[str, Decision]
    filters: Filters = Filters()
    otherwise: str = "not in the plan"
    always_split: bool = False

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Return the stored decision for a site."""
        known = self.decisions.get(name)
        return known or Decision(rank=None, reason=self.filters.refusal(name) or self.otherwise)

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Do nothing: the decisions were checked when they were made."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """A planner with the same `RankSpec` or `MaxError` for every site that the filters include.

    Attributes:
        spec: rank, ratio or error bound.
        ranks: for an error bound, the rank by site name (`planning.error_rank`); None if no smaller split meets it.
        include: globs on site names; empty for all.
        exclude: globs on site names that are excluded, also if they are included.
        always_split: whether sites are split even if nothing is saved, for tests at full rank and for teaching.
    """

    spec: RankSpec | MaxError
    ranks: Mapping[str, int | None] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    always_split: bool = False

    @property
    def filters(self) -> Filters:
        """The filters on sites."""
        return Filters(include=self.include, exclude=self.exclude)

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Decide one site with a weight of shape `(out, in)`, per group for a grouped Conv."""
        if refusal := self.filters.refusal(name):
            return Decision(rank=None, reason=refusal)
        if isinstance(self.spec, MaxError):
            if (found := self.ranks.get(name)) is None:
                return Decision(rank=None, reason=f"no rank that saves anything meets --max-error {self.spec}")
            return Decision(rank=found, reason=f"split: the smallest rank that meets --max-error {self.spec}")
        full = min(out_features, in_features)
        rank = self.spec.resolve(out_features, in_features)
        if self.always_split:
            return Decision(rank=min(rank, full), reason="asked for by --always-split")
        limit = break_even_rank(out_features, in_features)
        if rank >= limit:
            return Decision(rank=None, reason=f"rank {rank} saves nothing: break-even is {limit:.1f}")
        return Decision(rank=rank, reason="split")

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Check the settings against every site `(name, out, in)` of the model.

        Raises:
            UsageError: a filter matches no site, or an absolute rank exceeds the full rank of every site.
        """
        sites = list(sites)
        self.filters.check([name for name, _, _ in sites])
        full = max((min(out, in_) for _, out, in_ in sites), default=0)
        if sites and isinstance(self.spec, RankSpec) and self.spec.rank is not None and self.spec.rank > full:
            raise UsageError(
                f"--rank {self.spec.rank} is above the full rank of every site (the largest is {full}); "
                f"type a smaller rank or a ratio such as 25%"
            )
