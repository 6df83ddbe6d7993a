"""What becomes of every site: the chosen rank, or "dense" with the reason.

The planner sees names and shapes and knows neither torch nor ONNX, so both ways of a model share it.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.sites import break_even_rank


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """A user's `--rank`: exactly one of an absolute `rank` and a `ratio` of full rank in (0, 1]."""

    rank: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: "str | int | RankSpec") -> "RankSpec":
        """Read `64` (a rank) or `40%` (the paper's ratio); refuse everything else with the spelling to use.

        Raises:
            UsageError: a bare fraction, zero, a negative number, a ratio outside (0 %, 100 %], or no number.

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
        """The rank at a site; a ratio is `ceil(ratio * min(out, in))`. May exceed what the site can have."""
        if self.rank is not None:
            return self.rank
        assert self.ratio is not None
        return max(1, math.ceil(round(self.ratio * min(out_features, in_features), 9)))

    def __str__(self) -> str:
        return str(self.rank) if self.rank is not None else f"{100 * (self.ratio or 0):g}%"


@dataclass(frozen=True, kw_only=True)
class MaxError:
    """A user's `--max-error`: the rank of every site is the smallest whose error is at most `value`.

    Attributes:
        value: of the relative spectral error `||W - left right||_2 / ||W||_2`, or of the normalized error.
        normalized: whether it is the latter, `||W - left right||_2 / s_{rank+1}(W)`.
    """

    value: float
    normalized: bool

    @classmethod
    def parse(cls, text: "str | MaxError") -> "MaxError":
        """Read `5%` (of the weight's norm) or `1.1x` (times the best of that rank); refuse everything else.

        Raises:
            UsageError: a bare number, nothing above 0 %, nothing above 1x.

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
    """What decides the ranks where it is one of the two.

    Raises:
        UsageError: both, none, or one that cannot be read.
    """
    if (rank is None) == (max_error is None):
        raise UsageError("give exactly one of --rank and --max-error; type for example --rank 25%")
    return RankSpec.parse(rank) if rank is not None else MaxError.parse(max_error or "")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One site's fate: `rank` of the split, or None for dense; `reason` in words a user reads.

    `form` is of the split, "first" for the usual one of the operation.
    """

    rank: int | None
    reason: str
    form: Literal["matmul", "gemm", "channel", "input", "separable", "first"] = "first"


class SitePlanner(Protocol):
    """What decides every site; `always_split` forbids to do better than asked."""

    @property
    def always_split(self) -> bool:
        """Whether to split where nothing is saved, too."""

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Decide one site of matrix shape `(out, in)`."""

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Refuse, before any long work, what cannot be meant for these sites `(name, out, in)`."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which sites a user lets through: globs on site names.

    Attributes:
        include: empty lets every site through.
        exclude: wins over `include`.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def refusal(self, name: str) -> str:
        """Why a site stays out, or ""."""
        if self.include and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.include):
            return "not matched by --include"
        if pattern := next((p for p in self.exclude if fnmatch.fnmatchcase(name, p)), None):
            return f"excluded by --exclude {pattern}"
        return ""

    def check(self, names: Sequence[str]) -> None:
        """Refuse a glob that matches none of the sites' names.

        Raises:
            UsageError: names the option, the glob, and some sites.
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
    """Every site decided beforehand: by a budget, or by a plan somebody wrote.

    Attributes:
        decisions: by site name.
        filters: which sites were let through, for the reasons of those that were not.
        otherwise: the reason for a site that is not among them; it stays dense.
    """

    decisions: Mapping[str, Decision]
    filters: Filters = Filters()
    otherwise: str = "not in the plan"
    always_split: bool = False

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """What was decided for a site."""
        known = self.decisions.get(name)
        return known or Decision(rank=None, reason=self.filters.refusal(name) or self.otherwise)

    def check(self, sites: Iterable[tuple[str, int, int]]) -> None:
        """Nothing left to refuse."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Uniform ranks: the same `RankSpec` at every site that the filters let through; or the same `MaxError`.

    Attributes:
        spec: the rank, ratio or error asked for.
        ranks: for an error: what was found, by site name (`plan.error_rank`); None where no rank that saves meets it.
        include: globs on site names; empty lets every site through.
        exclude: globs on site names; wins over `include`.
        always_split: split even where nothing is saved (full-rank checks, teaching, tests).
    """

    spec: RankSpec | MaxError
    ranks: Mapping[str, int | None] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    always_split: bool = False

    @property
    def filters(self) -> Filters:
        """Which sites are let through."""
        return Filters(include=self.include, exclude=self.exclude)

    def decide(self, name: str, out_features: int, in_features: int) -> Decision:
        """Decide one site of matrix shape `(out, in)` (per group, for a grouped Conv)."""
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
        """Refuse, before any long work, a request that cannot be meant.

        Args:
            sites: `(name, out, in)` of every site of the model.

        Raises:
            UsageError: a filter that matches no site, or an absolute rank above the full rank of every site.
        """
        sites = list(sites)
        self.filters.check([name for name, _, _ in sites])
        full = max((min(out, in_) for _, out, in_ in sites), default=0)
        if sites and isinstance(self.spec, RankSpec) and self.spec.rank is not None and self.spec.rank > full:
            raise UsageError(
                f"--rank {self.spec.rank} is above the full rank of every site (the largest is {full}); "
                f"type a smaller rank or a ratio such as 25%"
            )
