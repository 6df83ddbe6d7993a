"""Do plans meet their latency budgets, and are cost tables accurate?

    landing      `--keep-latency 0.6` at batch 1: the share of the dense time that is measured afterwards, in a run of
                 its own; nets that cannot reach it say so
    prediction   predicted times of whole models (site times of a table, scale of two trial plans) against measured ones
    gemm         at 0.5 of the MACs, batch 8: the speed-up, against the ideal one, 1 / kept MACs
    accuracy     the plan by time against the plan by MACs that is as fast: score of the fitted models, and both times
    table        seconds for a table of ResNet-50, and for its reuse

Where only time counts, factors are zeros and a plan's loss is the share of rank lost (`bench.timed`). Accuracy is that
of fitted factors on test data (`bench.cases`).

Goals (`--check` exits 4 when one is missed):
  1. every net that can reach 0.6 lands between 0.52 and 0.62;
  2. at least 8 of 10 predictions are within 10 % of the measured time;
  3. GEMM-heavy nets reach 85 % of the ideal speed-up;
  4. at equal time (within 3 %) the plan by time scores at least as high as the plan by MACs;
  5. the table takes under 5 minutes, its reuse under a second.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.table import Table

from bench import cases, common, models, timed, untrained
from bench.common import Goal
from bench.timed import Setting, Splits
from rsi_deploy.core.errors import ModelError
from rsi_deploy.costing.cost_table import CostTable, PlanCheck
from rsi_deploy.costing.trial_plans import measured_plans, share_of
from rsi_deploy.costing.zero_filled import write_zero_filled
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.split import split_model
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Planned, decide_by_budget, planned_splits
from rsi_deploy.planning.knapsack import SiteOptions, choose
from rsi_deploy.planning.latency_search import decide_by_time, faster_only, options_with_saving, priced, saving_of
from rsi_deploy.planning.planner import FixedPlanner
from rsi_deploy.planning.site_options import Calibration

PARTS = ("landing", "prediction", "gemm", "accuracy", "table")
THREADS, KEEP, LOWEST, HIGHEST = 2, 0.6, 0.52, 0.62
PREDICTED_AT = (0.85, 0.7, 0.5)
GEMM_NETS, GEMM_KEEP, GEMM_BATCH, GEMM_SHARE = ("minilm", "vit_b_32", "vgg19"), 0.5, 8, 0.85
ACCURACY_NETS = ("resnet20", "minilm", "resnet56")
EQUAL = 0.03
QUICK_NETS = ("cnn_cifar10",)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The settings of every part.

    Attributes:
        seconds: seconds of one measurement.
        table: seconds for a cost table.
        threads: threads inside one operator.
    """

    seconds: float
    table: float
    threads: int


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.latency_plans")
    options.add_argument("--nets", nargs="+", metavar="NAME", help=f"of {', '.join(timed.NETS)} [default: all]")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument("--seconds", type=float, default=8.0, help="per measurement [default: 8]")
    options.add_argument("--threads", type=int, default=THREADS, help=f"inside one operator [default: {THREADS}]")
    options.add_argument("--table", type=float, default=120.0, help="seconds for a cost table [default: 120]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    nets = tuple(args.nets or (QUICK_NETS if args.quick else timed.NETS))
    parts = ("landing", "prediction") if args.quick else tuple(args.parts)
    seconds, table = (1.0, 8.0) if args.quick else (args.seconds, args.table)
    effort = Effort(seconds=seconds, table=table, threads=args.threads)
    results: dict[str, Any] = {part: [] for part in parts}
    skipped: dict[str, str] = {}
    settings = {"nets": nets, "parts": parts, **asdict(effort)}
    for part in parts:
        for net in _nets_of(part, nets):
            common.progress(f"{part}: {net}")
            with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
                try:
                    results[part] += RUNS[part](net, Path(folder), effort)
                except (models.UnavailableError, ModelError) as reason:
                    skipped[f"{part}, {net}"] = str(reason)
            made = common.document("bench.latency_plans", arguments, settings, results=results, skipped=skipped)
            common.write(args.json, made)
            common.write(args.markdown, markdown(results, skipped, made))
    for part, rows in results.items():
        shown = Table(*_columns(rows), title=part)
        for row in rows:
            shown.add_row(*map(_cell, row.values()))
        common.console().print(shown)
    for name, reason in skipped.items():
        common.console().print(f"skipped: {name}: {reason}", soft_wrap=True)
    return common.judge(goals(results), args.check)


def landing(net: str, folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """Measure where `--keep-latency 0.6` lands, in a run of its own."""
    here = timed.setting(net, untrained.written(net, folder), 1, effort.threads, effort.table)
    options, _ = faster_only(here.options(), here.table)
    try:
        landed = decide_by_time(
            Budget(keep_latency=KEEP), options, here.table, _streams(here), _check(here, effort.seconds)
        )
    except ModelError as error:
        return [{"net": net, "share": None, "interval": None, "rounds": 0, "says": str(error)}]
    splits = planned_splits(landed.decisions, _streams(here))
    write_zero_filled(here.dense, folder / "model.onnx", splits)
    share, ends = share_of(here.measured([folder / "model.onnx"], ["plan"], 2 * effort.seconds).arms[1])
    return [{"net": net, "share": share, "interval": ends, "rounds": len(landed.checks), "says": landed.note}]


def prediction(net: str, folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """Predict and measure plans for several shares of the time; shares that no plan reaches are left out."""
    here = timed.setting(net, untrained.written(net, folder), 1, effort.threads, effort.table)
    options = priced(faster_only(here.options(), here.table)[0], here.table)
    rows = []
    for share in PREDICTED_AT:
        splits = timed.splits_of(options_with_saving(options, saving_of(share, here.table), here.table))
        if here.table.predicted(splits) > share + 1e-6:
            continue
        found = _check(here, effort.seconds)(splits, here.table)
        error = found.predicted / found.measured - 1
        rows.append({"net": net, "predicted": found.predicted, "measured": found.measured, "error": error})
    return rows


def gemm(net: str, folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """The speed-up at half of the MACs."""
    here = timed.setting(net, untrained.written(net, folder), GEMM_BATCH, effort.threads, effort.table)
    options, _ = faster_only(here.options(), here.table)
    fixed = here.total_macs - sum(site.options[0].macs for site in options)
    smallest = fixed + sum(min(option.macs for option in site.options) for site in options)
    if smallest > GEMM_KEEP * here.total_macs:
        return [{"net": net, "kept_macs": None, "speedup": None, "of_ideal": None}]
    choice = choose(options, cost="macs", limit=int(GEMM_KEEP * here.total_macs) - fixed)
    kept = (fixed + sum(option.macs for option in choice.values())) / here.total_macs
    write_zero_filled(here.dense, folder / "model.onnx", timed.splits_of(choice))
    arm = here.measured([folder / "model.onnx"], ["plan"], 3 * effort.seconds).arms[1]
    assert arm.speedup is not None
    return [{"net": net, "kept_macs": kept, "speedup": arm.speedup, "of_ideal": arm.speedup * kept}]


def accuracy(net: str, folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """The plan by time and the plan by MACs that is as fast: fitted, scored, and measured in one run."""
    case = cases.load(net, folder)
    here = timed.setting(net, case.path, 1, effort.threads, effort.table)
    streams, calibration = case.streams(0), Calibration(solver=Solver())
    options, dense = calibration.options(streams), case.measured(case.path)
    narrowed, _ = faster_only(options, here.table)
    landed = decide_by_time(Budget(keep_latency=KEEP), narrowed, here.table, streams, _check(here, effort.seconds))
    by_time = planned_splits(landed.decisions, streams)

    def by_macs(keep: float) -> Splits:
        return dict(planned_splits(decide_by_budget(Budget(keep_macs=keep), options, dense, streams), streams))

    keep = _as_fast(here, by_time, by_macs, options, dense.macs, effort.seconds)
    paths = {"by time": folder / "time.onnx", "by MACs": folder / "macs.onnx"}
    decided = {
        "by time": landed.decisions,
        "by MACs": decide_by_budget(Budget(keep_macs=keep), options, dense, streams),
    }
    rows = []
    for name, path in paths.items():
        fitted = calibration.fit(streams, planned_splits(decided[name], streams))
        _write(case.path, path, Planned(planner=FixedPlanner(decisions=decided[name]), fitted=fitted))
    arms = here.measured(list(paths.values()), list(paths), 3 * effort.seconds).arms[1:]
    for arm, (name, path) in zip(arms, paths.items(), strict=True):
        share, ends = share_of(arm)
        kept = sum(case.macs(path).values()) / dense.macs
        score = case.score(path).value
        rows.append({"net": net, "plan": name, "score": score, "share": share, "interval": ends, "kept_macs": kept})
    return rows


def table_cost(net: str, folder: Path, effort: Effort) -> list[dict[str, Any]]:
    """Measure the seconds of the first table with the defaults of `profile`, and of its reuse."""
    from rsi_deploy.exporting.timing.profile import Costing, fed_with

    dense = untrained.written(net, folder)
    feeds, costing = fed_with(dense, 1, 0, None, None), Costing(threads=effort.threads)
    started = time.perf_counter()
    made = costing.table(dense, feeds, name=net, fresh=True)
    first = time.perf_counter() - started
    started = time.perf_counter()
    costing.table(dense, feeds, name=net)
    widths = [cost.half_width or 1.0 for cost in made.costs]
    return [
        {
            "net": net,
            "seconds": first,
            "reuse": time.perf_counter() - started,
            "shapes": len(made.costs),
            "median_half_width": statistics.median(widths),
        }
    ]


RUNS: dict[str, Callable[[str, Path, Effort], list[dict[str, Any]]]] = {
    "landing": landing,
    "prediction": prediction,
    "gemm": gemm,
    "accuracy": accuracy,
    "table": table_cost,
}


def goals(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Goal]:
    """Return the goals of the docstring whose part was run."""
    found = []
    for row in results.get("landing", ()):
        if row["share"] is not None:
            held = LOWEST <= row["share"] <= HIGHEST
            found.append(Goal(name=f"landing, {row['net']}", held=held, row=f"{row['share']:.3f} of the dense time"))
    if rows := results.get("prediction"):
        near = sum(abs(row["error"]) <= 0.1 for row in rows)
        found.append(
            Goal(name="predictions within 10 %", held=10 * near >= 8 * len(rows), row=f"{near} of {len(rows)} plans")
        )
    for row in results.get("gemm", ()):
        if row["of_ideal"] is not None:
            held = row["of_ideal"] >= GEMM_SHARE
            found.append(Goal(name=f"ideal speed-up, {row['net']}", held=held, row=f"{row['of_ideal']:.0%} of it"))
    pairs = results.get("accuracy", ())
    for ours, theirs in zip(pairs[::2], pairs[1::2], strict=True):
        equal = abs(ours["share"] / theirs["share"] - 1) <= EQUAL
        row = f"{ours['score']:.2f} at {ours['share']:.3f} against {theirs['score']:.2f} at {theirs['share']:.3f}"
        held = equal and ours["score"] >= theirs["score"]
        found.append(Goal(name=f"accuracy at equal time, {ours['net']}", held=held, row=row))
    for row in results.get("table", ()):
        held = row["seconds"] < 300 and row["reuse"] < 1
        found.append(Goal(name="table", held=held, row=f"{row['seconds']:.0f} s, again {row['reuse']:.2f} s"))
    return found


def _nets_of(part: str, nets: Sequence[str]) -> list[str]:
    own = {"gemm": GEMM_NETS, "accuracy": ACCURACY_NETS, "table": ("resnet50",)}.get(part, nets)
    return [net for net in own if net in nets or part == "table"]


def _streams(here: Setting) -> Any:
    """What `decide_by_time` wants to know of a model's sites."""
    sites = tuple(SimpleNamespace(name=name, forms=site.forms) for name, site in here.sites.items())
    return SimpleNamespace(sites=sites, unreachable={})


def _check(here: Setting, seconds: float) -> Callable[[Mapping[str, tuple[str, int]], CostTable], PlanCheck]:
    def check(splits: Mapping[str, tuple[str, int]], table: CostTable) -> PlanCheck:
        result = measured_plans(here.dense, here.feeds, [splits], "cpu", here.threads, seconds)
        share, ends = share_of(result.arms[1])
        return PlanCheck(
            scale=table.model.scale, predicted=table.predicted(splits), measured=share, measured_interval=ends
        )

    return check


def _as_fast(
    here: Setting,
    by_time: Splits,
    by_macs: Callable[[float], Splits],
    options: Sequence[SiteOptions],
    total: int,
    seconds: float,
) -> float:
    """Find by bisection on measured models the share of MACs whose plan takes the time of `by_time`."""
    least = total - sum(site.options[0].macs - min(o.macs for o in site.options) for site in options)
    low, high = least / total + 0.01, 0.98
    for _ in range(6):
        keep = (low + high) / 2
        plans = [by_time, by_macs(keep)]
        arms = measured_plans(here.dense, here.feeds, plans, "cpu", here.threads, seconds).arms
        ratio = arms[2].median_ms / arms[1].median_ms
        if abs(ratio - 1) < EQUAL / 2:
            break
        low, high = (keep, high) if ratio < 1 else (low, keep)
    return keep


def _write(dense: Path, path: Path, made: Planned) -> None:
    import onnx_ir as ir

    split_model(ir.load(dense), made.planner, Solver(), path=path, fitted=made.fitted)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name.replace("_", " ") for name in (rows[0] if rows else ())]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, tuple | list):
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    return "-" if value is None else str(value)


def markdown(
    results: Mapping[str, Sequence[Mapping[str, Any]]], skipped: Mapping[str, str], made: Mapping[str, Any]
) -> str:
    """A table a part, with the command, the goals and what was skipped."""
    machine = made["machine"]
    lines = [f"`{made['command']}`", f"{machine['cpu']}, {machine['cores']} cores; load {machine['load_average']}"]
    for part, rows in results.items():
        if rows:
            lines.append(f"**{part}**")
            lines.append(common.markdown_table(_columns(rows), [[_cell(v) for v in row.values()] for row in rows]))
    lines += [f"- {'held' if goal.held else 'MISSED'}: {goal.name}: {goal.row}" for goal in goals(results)]
    lines += [f"- skipped: {name}: {reason}" for name, reason in skipped.items()]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    common.run(main)
