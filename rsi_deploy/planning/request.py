"""The request for ranks and calibration. A contradiction is refused before any work."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.groups import CalibrationConfig
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.data.sources import Dataset
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.plan_file import Plan, read_plan
from rsi_deploy.planning.planner import Filters, MaxError, Planner, RankSpec, rank_spec
from rsi_deploy.planning.quality import DEFAULTS, KINDS, OPTIONS, Measure, QualityBudget
from rsi_deploy.planning.settings import ExportSettings

BUDGETS = ("keep_params", "keep_macs", "max_size", "keep_latency", "max_latency")
UNDER_A_BUDGET = ("max_drop", "fastest", "allow_broken", "min_rank", "rank_multiple")
SIZES = ("rank", "max_error", "max_drop", "plan", *BUDGETS)
QUALITIES: dict[Measure, str] = {"agreement": "min_agreement", "cosine": "min_cosine"}

Unlabelled = str | Path | Dataset | Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """The rule that decides the ranks, and the data that factors are fitted to.

    With calibration data and no rule, a quality decides: the default one for the kind of the model's outputs.

    Attributes:
        rank: one rank or ratio for every site; or one error, which each site meets with its smallest rank.
        budget: limit on the whole model.
        quality: limit on the quality of the outputs on the check part.
        is_default: whether `quality` is the default one.
        max_drop: percentage points of top-1 that may be lost on evaluation data.
        fastest: whether a limit on quality or accuracy is for the fastest model, not for the smallest.
        allow_broken: whether a budget may break the model.
        plan: form and rank of each site, read from `plan_name`.
        plan_name: name of the plan's file, for messages and the report.
        calib: unlabelled data; None factorizes by the weights alone.
        calib_size: most samples of `calib` that factors are fitted to.
        check_size: number of samples of the check part; None for the usual number.
        calib_check: separate data for the check part; None takes a part of `calib`.
        factors: "response" fits the factors to the data; "weights" is the paper's plain method, at the decided ranks.
        min_rank: smallest rank under a budget.
        rank_multiple: number that every rank under a budget is a multiple of.
        allow_shared_data: whether calibration samples may be evaluation samples too.
        pivoted: whether a budget may choose the pivoted form. In eight bits and fewer it loses more than it saves,
            because its second node multiplies what the first one has rounded.

    Raises:
        UsageError: says what to type.
    """

    rank: RankSpec | MaxError | None = None
    budget: Budget | None = None
    quality: QualityBudget | None = None
    is_default: bool = False
    max_drop: float | None = None
    fastest: bool = False
    allow_broken: bool = False
    plan: Plan | None = None
    plan_name: str = ""
    calib: Unlabelled | None = None
    calib_size: int = 1024
    check_size: int | None = None
    calib_check: Unlabelled | None = None
    factors: Literal["response", "weights"] = "response"
    min_rank: int = 1
    rank_multiple: int = 1
    allow_shared_data: bool = False
    pivoted: bool = True

    def __post_init__(self) -> None:
        rules = self._rules
        if len(rules) != 1 and not self.needs_quality:
            raise UsageError(
                f"give exactly one of --rank, --max-error, --keep-params, --keep-macs, --max-size, --keep-latency, "
                f"--max-latency, --max-perplexity, --min-agreement, --min-cosine, --max-drop and --plan, but got "
                f"{' and '.join(rules) or 'none'}; type for example --rank 25%, or add --calib DATA alone"
            )
        if self.is_searched and self.calib is None:
            raise UsageError(f"{rules[0]} is planned on calibration data: add --calib DATA (unlabelled inputs)")
        if self.fastest and not self.is_limited:
            raise UsageError(
                f"--fastest goes with --max-perplexity, --min-agreement, --min-cosine, --max-output-error or "
                f"--max-drop, but got {rules[0]}; leave --fastest out"
            )
        if self.allow_broken and self.budget is None:
            raise UsageError("--allow-broken goes with a budget such as --keep-macs 50%; leave it out")
        for option, value in (("--min-rank", self.min_rank), ("--rank-multiple", self.rank_multiple)):
            if value > 1 and not self.is_searched:
                raise UsageError(f"{option} holds ranks that a budget chooses, but got {rules[0]}; leave {option} out")
        if self.check_size is not None and self.calib is None:
            raise UsageError("--check-size is a part of --calib: add --calib DATA, or leave --check-size out")
        if self.calib_check is not None and self.calib is None:
            raise UsageError("--calib-check goes with --calib: add --calib DATA, which factors are fitted to")
        if isinstance(self.rank, MaxError) and self.calib is not None:
            raise UsageError("--max-error judges factors of the weights alone: leave --calib out")

    @classmethod
    def of(cls, config: ExportConfig) -> "RankRequest":
        """Read the settings of an export.

        Raises:
            UsageError: they contradict each other, or a rank, an error or a plan cannot be read.
        """
        rank = None if config.rank == "auto" else config.rank
        limits = {name: getattr(config, name) for name in BUDGETS if getattr(config, name) is not None}
        return cls(
            quality=_quality(config),
            rank=None if rank is None and config.max_error is None else rank_spec(rank, config.max_error),
            budget=Budget(**limits) if limits else None,
            plan=None if config.plan is None else read_plan(config.plan),
            plan_name="" if config.plan is None else Path(config.plan).name,
            **{name: getattr(config, name) for name in (*CalibrationConfig.model_fields, *UNDER_A_BUDGET)},
        )

    def with_least_rank(self, rank: int) -> "RankRequest":
        """Return the request with this smallest rank, which also divides ranks where the request names no number."""
        if rank == 1 or not self.is_searched:
            return self
        multiple = rank if self.rank_multiple == 1 else self.rank_multiple
        return replace(self, min_rank=max(rank, self.min_rank), rank_multiple=multiple)

    @property
    def is_searched(self) -> bool:
        """Return whether a budget chooses the ranks."""
        return self.budget is not None or self.is_limited

    @property
    def is_limited(self) -> bool:
        """Return whether a limit on quality or accuracy chooses the ranks."""
        return self.quality is not None or self.max_drop is not None or self.needs_quality

    @property
    def is_in_time(self) -> bool:
        """Return whether times choose the ranks."""
        return self.fastest or (self.budget is not None and self.budget.cost == "nanoseconds")

    @property
    def is_limited_by_error(self) -> bool:
        """Return whether `--max-output-error` chooses the ranks, and is no gate."""
        return self.quality is not None and self.quality.measure == "output_error"

    @property
    def needs_quality(self) -> bool:
        """Return whether the kind of the outputs has to choose the limit, because nothing else decides the ranks."""
        return self.calib is not None and not self._rules

    @property
    def is_fitted(self) -> bool:
        """Return whether factors are fitted to calibration data."""
        return self.calib is not None and self.factors == "response"

    @property
    def decided_by(self) -> str:
        """The option that decides the ranks, as it is typed; "" for a rank."""
        fastest = " --fastest" * self.fastest
        if self.max_drop is not None:
            return f"--max-drop {self.max_drop:g}{fastest}"
        if self.quality is not None:
            return f"{self.quality}{fastest}"
        if self.needs_quality:
            found = [f"{QualityBudget.default(measure)} ({KINDS[measure]})" for measure in DEFAULTS]
            return f"{', '.join(found[:-1])} or {found[-1]}{fastest}"
        if isinstance(self.rank, MaxError):
            return f"--max-error {self.rank}"
        return f"--plan {self.plan_name}" if self.plan is not None else str(self.budget or "")

    def check_against(self, *, data: object, always_split: bool) -> None:
        """Refuse what contradicts the other settings.

        Raises:
            UsageError: says what to type.
        """
        if self.max_drop is not None and data is None:
            raise UsageError("--max-drop is measured on labelled data: add --data DATA")
        if always_split and not isinstance(self.rank, RankSpec):
            raise UsageError(
                f"--always-split goes with --rank alone, but got {(*self._rules, 'none')[0]}; leave it out"
            )

    def planner(self, filters: Filters, *, always_split: bool) -> Planner | None:
        """Return the planner of one rank or error for every site; None where a budget or a plan decides."""
        if self.rank is None:
            return None
        return Planner(spec=self.rank, include=filters.include, exclude=filters.exclude, always_split=always_split)

    def settings(
        self, filters: Filters, solver: Solver, *, always_split: bool, joint: bool, opset: int | None
    ) -> ExportSettings:
        """Return what shapes model.onnx, for the report and the model's metadata."""
        return ExportSettings(
            rank=str(self.rank) if isinstance(self.rank, RankSpec) else "",
            budget=self.decided_by,
            factors="response" if self.is_fitted else "weights",
            calib_size=0 if self.calib is None else self.calib_size,
            min_rank=self.min_rank,
            rank_multiple=self.rank_multiple,
            method=solver.method,
            power_iterations=1 if solver.method == "rsvd" else solver.power_iterations,
            oversampling=solver.oversampling,
            route=solver.route,
            mixed_precision=solver.mixed_precision,
            seed=solver.seed,
            include=filters.include,
            exclude=filters.exclude,
            always_split=always_split,
            joint=joint and not always_split and self.rank is not None and not self.is_fitted,
            opset=opset or 0,
        )

    @property
    def _rules(self) -> list[str]:
        """The options that decide the ranks, as they are typed."""
        budget = "" if self.budget is None else str(self.budget).split()[0]
        rules = {
            "--max-error" if isinstance(self.rank, MaxError) else "--rank": self.rank,
            budget: self.budget,
            "--plan": self.plan,
            "--max-drop": self.max_drop,
            "" if self.quality is None else OPTIONS[self.quality.measure]: self.quality,
        }
        return [option for option, value in rules.items() if value is not None]


def _quality(config: ExportConfig) -> QualityBudget | None:
    """Return the limit on the quality of the outputs.

    Raises:
        UsageError: more than one rule.
    """
    found = [QualityBudget(measure=m, limit=value) for m, n in QUALITIES.items() if (value := getattr(config, n))]
    if config.max_perplexity is not None:
        found.append(QualityBudget.of_perplexity(config.max_perplexity))
    if len(found) > 1:
        raise UsageError(f"give one of {' and '.join(OPTIONS[each.measure] for each in found)}")
    if found:
        return found[0]
    if config.max_output_error is None or any(getattr(config, name) not in (None, "auto") for name in SIZES):
        return None
    return QualityBudget(measure="output_error", limit=config.max_output_error)
