"""What a user asks of ranks and calibration, refused before any work where it contradicts itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.sources import Dataset
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.plan_file import Plan
from rsi_deploy.planning.planner import Filters, MaxError, Planner, RankSpec
from rsi_deploy.planning.settings import ExportSettings

Unlabelled = str | Path | Dataset | Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """What decides the ranks (exactly one of five), and the data that factors are fitted to.

    Attributes:
        rank: the same at every site; or the same error, at the smallest rank that meets it.
        budget: of the whole model.
        max_drop: percentage points of top-1 that may be lost on evaluation data.
        plan: forms and ranks site by site, read from `plan_name`.
        plan_name: of the plan's file, for messages and the report.
        calib: unlabelled data; None factorizes by the weights alone.
        calib_size: at most so many samples of them.
        factors: "response" fits them to the data, "weights" is the paper's plain method, at the ranks decided.
        min_rank: no rank below it under a budget.
        rank_multiple: ranks under a budget are multiples of it.
        allow_shared_data: whether calibration samples may be evaluation samples too.

    Raises:
        UsageError: says what to type.
    """

    rank: RankSpec | MaxError | None = None
    budget: Budget | None = None
    max_drop: float | None = None
    plan: Plan | None = None
    plan_name: str = ""
    calib: Unlabelled | None = None
    calib_size: int = 1024
    factors: Literal["response", "weights"] = "response"
    min_rank: int = 1
    rank_multiple: int = 1
    allow_shared_data: bool = False

    def __post_init__(self) -> None:
        given = self._given
        if len(given) != 1:
            raise UsageError(
                f"give exactly one of --rank, --max-error, --keep-params, --keep-macs, --max-size, --keep-latency, "
                f"--max-latency, --max-drop and --plan, but got {' and '.join(given) or 'none'}; type for example "
                f"--rank 25%"
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise UsageError(f"--max-drop takes percentage points, 0 to 100, but got {self.max_drop:g}")
        if self.is_searched and self.calib is None:
            raise UsageError(f"{given[0]} is planned on calibration data: add --calib DATA (unlabelled inputs)")
        for option, value in (("--min-rank", self.min_rank), ("--rank-multiple", self.rank_multiple)):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, but got {value}")
            if value > 1 and not self.is_searched:
                raise UsageError(f"{option} holds ranks that a budget chooses, but got {given[0]}; leave {option} out")
        if isinstance(self.rank, MaxError) and self.calib is not None:
            raise UsageError("--max-error judges factors of the weights alone: leave --calib out")
        if self.factors not in ("response", "weights"):
            raise UsageError(f"--factors must be response or weights, but got {self.factors!r}")
        if self.calib_size < 1:
            raise UsageError(f"--calib-size must be at least 1, but got {self.calib_size}")

    @property
    def is_searched(self) -> bool:
        """Whether ranks are chosen by what they cost and lose."""
        return self.budget is not None or self.max_drop is not None

    @property
    def is_fitted(self) -> bool:
        """Whether factors are fitted to calibration data."""
        return self.calib is not None and self.factors == "response"

    @property
    def decided_by(self) -> str:
        """What decides the ranks, in the words of the command line; "" for a rank."""
        if self.max_drop is not None:
            return f"--max-drop {self.max_drop:g}"
        if isinstance(self.rank, MaxError):
            return f"--max-error {self.rank}"
        return f"--plan {self.plan_name}" if self.plan is not None else str(self.budget or "")

    def check_against(self, *, data: object, always_split: bool) -> None:
        """Refuse what goes together with none of the other options.

        Raises:
            UsageError: says what to type.
        """
        if self.max_drop is not None and data is None:
            raise UsageError("--max-drop is measured on labelled data: add --data DATA")
        if always_split and not isinstance(self.rank, RankSpec):
            raise UsageError(f"--always-split goes with --rank alone, but got {self._given[0]}; leave it out")

    def planner(self, filters: Filters, *, always_split: bool) -> Planner | None:
        """Of the same rank everywhere; None where a budget or a plan decides."""
        if self.rank is None:
            return None
        return Planner(spec=self.rank, include=filters.include, exclude=filters.exclude, always_split=always_split)

    def settings(
        self, filters: Filters, solver: Solver, *, always_split: bool, joint: bool, opset: int | None
    ) -> ExportSettings:
        """What shapes model.onnx, for the report and the model's metadata."""
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
    def _given(self) -> list[str]:
        """The options that decide the ranks, as they were typed."""
        budget = "" if self.budget is None else str(self.budget).split()[0]
        given = {
            "--max-error" if isinstance(self.rank, MaxError) else "--rank": self.rank,
            budget: self.budget,
            "--plan": self.plan,
            "--max-drop": self.max_drop,
        }
        return [option for option, value in given.items() if value is not None]


def given_budget(
    keep_params: str | float | None,
    keep_macs: str | float | None,
    max_size: str | int | None,
    keep_latency: str | float | None = None,
    max_latency: str | None = None,
) -> Budget | None:
    """The budget as typed; None where none was."""
    if all(option is None for option in (keep_params, keep_macs, max_size, keep_latency, max_latency)):
        return None
    return Budget.parse(
        keep_params=keep_params,
        keep_macs=keep_macs,
        max_size=max_size,
        keep_latency=keep_latency,
        max_latency=max_latency,
    )
