"""Is a delivered model ever slower than the dense one, and how often is a naive split?

Every net at batch 1 and 8, with 1 and 2 threads, at every tenth of the kept-parameters budget, two ways:

    naive       the same ratio of full rank at every site that it makes smaller, in the usual form, as all tools do
    delivered   what `export --keep-params` does: only splits that a cost table shows faster, planned under the budget;
                then `rsi_deploy.exporting.timing.slowdown_rollback`: where the model is not shown faster as a whole,
                splits are undone, the least useful first

Both are then judged in a run of their own, interleaved with the dense model (`rsi_deploy.bench`). A budget that no
faster split can meet is refused and counted separately. Factors are zeros: values change no time.

Goal (`--check` exits 4 when it is missed): no delivered model is shown slower than dense.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import common, models, timed, untrained
from bench.common import Goal
from bench.timed import Setting, Splits
from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.costing.zero_filled import write_zero_filled
from rsi_deploy.planning.knapsack import SiteOptions, UnreachableLimitError, choose
from rsi_deploy.planning.latency_search import faster_only
from rsi_deploy.planning.planner import Planner, RankSpec
from rsi_deploy.runtime.float16 import float16_file

BATCHES, THREADS = (1, 8), (1, 2)
PRECISIONS = ("float32", "float16")
TENTHS = tuple(tenth / 10 for tenth in range(9, 0, -1))
QUICK_NETS, QUICK_TENTHS = ("cnn_cifar10",), (0.5, 0.2)


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.never_slower")
    options.add_argument("--nets", nargs="+", metavar="NAME", help=f"of {', '.join(timed.NETS)} [default: all]")
    options.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    options.add_argument("--threads", nargs="+", type=int, default=THREADS)
    options.add_argument("--provider", default="cpu", help="of onnxruntime, with options [default: cpu]")
    options.add_argument("--precision", choices=PRECISIONS, default="float32", help="of all models [default: float32]")
    options.add_argument("--dense", type=Path, metavar="FOLDER", help="folder of dense models: see bench.untrained")
    options.add_argument("--tenths", nargs="+", type=int, help="budgets, such as 5 2 [default: 9 to 1]")
    options.add_argument("--seconds", type=float, default=4.0, help="per measurement [default: 4]")
    options.add_argument("--table", type=float, default=120.0, help="seconds for a cost table [default: 120]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    nets = tuple(args.nets or (QUICK_NETS if args.quick else timed.NETS))
    batches, threads = ((1,), (2,)) if args.quick else (tuple(args.batches), tuple(args.threads))
    seconds, table = (1.0, 8.0) if args.quick else (args.seconds, args.table)
    tenths = tuple(t / 10 for t in args.tenths) if args.tenths else QUICK_TENTHS if args.quick else TENTHS
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    settings = {"nets": nets, "batches": batches, "threads": threads, "seconds": seconds, "table": table}
    settings |= {"provider": args.provider, "precision": args.precision}
    for net in nets:
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
            try:
                dense = untrained.written(net, args.dense or Path(folder))
                dense = float16_file(dense, Path(folder)) if args.precision == "float16" else dense
            except models.UnavailableError as reason:
                skipped[net] = str(reason)
                continue
            for batch in batches:
                for count in threads:
                    common.progress(f"{net}: batch {batch}, {count} threads")
                    here = timed.setting(net, dense, batch, count, table, args.provider)
                    for row in rows_of(here, batch, tenths, seconds, Path(folder)):
                        rows.append(row)
                        made = common.document(
                            "bench.never_slower", arguments, settings, rows=rows, skipped=skipped, summary=summary(rows)
                        )
                        common.write(args.json, made)
                        common.write(args.markdown, markdown(rows, skipped, made))
    out = common.console()
    shown = Table(*COLUMNS)
    for cells in _cells(rows):
        shown.add_row(*cells)
    out.print(shown)
    for name, reason in skipped.items():
        out.print(f"skipped: {name}: {reason}", soft_wrap=True)
    return common.judge(goals(rows), args.check)


def rows_of(
    here: Setting, batch: int, tenths: Sequence[float], seconds: float, folder: Path
) -> Iterator[dict[str, Any]]:
    """Return one row for each budget."""
    options, _ = faster_only(here.options(), here.table)
    for tenth in tenths:
        what = {"net": here.net, "batch": batch, "threads": here.threads, "keep_params": tenth}
        paths, labels = [], []
        naive = naive_splits(here, tenth)
        if naive:
            write_zero_filled(here.dense, folder / "naive.onnx", naive)
            paths, labels = [folder / "naive.onnx"], ["naive"]
        outcome, splits, planned = delivered(here, options, tenth, seconds, folder)
        if splits:
            paths.append(folder / "delivered.onnx")
            labels.append("delivered")
        arms = {arm.label: arm for arm in here.measured(paths, labels, seconds).arms[1:]} if paths else {}
        yield {
            **what,
            "naive": judged(arms.get("naive")),
            "delivered": judged(arms.get("delivered")),
            "outcome": outcome,
            "splits": len(splits),
            "planned": planned,
            "naive_splits": len(naive),
        }


def naive_splits(here: Setting, share: float) -> Splits:
    """The uniform ratio, in tenths of a percent, at which the model keeps this share of its parameters or fewer."""
    for permille in range(1000, 0, -5):
        planner = Planner(spec=RankSpec(ratio=permille / 1000))
        splits: Splits = {}
        params = here.params
        for name, site in here.sites.items():
            rank = planner.decide(name, site.out_features, site.in_features).rank
            if rank is not None:
                splits[name] = (site.forms[0], rank)
                numbers = site.out_features * site.in_features - rank * (site.out_features + site.in_features)
                params -= site.groups * numbers
        if splits and params <= share * here.params:
            return splits
    return {}


def delivered(
    here: Setting, options: Sequence[SiteOptions], share: float, seconds: float, folder: Path
) -> tuple[str, Splits, int]:
    """Return what is delivered in words, its splits and the number planned; the model is `delivered.onnx`."""
    if all(len(site.options) == 1 for site in options):
        return "dense", {}, 0
    fixed = here.params - sum(site.options[0].params for site in options)
    try:
        choice = choose(options, cost="params", limit=int(share * here.params) - fixed)
    except UnreachableLimitError:
        return "refused: no faster splits keep it", {}, 0
    planned = timed.splits_of(choice)
    splits = timed.after_rollback(here, planned, folder / "delivered.onnx", seconds)
    if not splits:
        return "dense", {}, len(planned)
    words = "as planned" if splits == planned else f"{len(planned) - len(splits)} splits undone"
    return words, splits, len(planned)


def judged(arm: VariantResult | None) -> dict[str, Any] | None:
    """Compare with the dense model; None where the dense model or no model is delivered."""
    if arm is None:
        return None
    assert arm.speedup_interval is not None
    sign = direction(arm.speedup_interval) if arm.blocks >= MIN_BLOCKS else 0
    return {
        "speedup": arm.speedup,
        "interval": arm.speedup_interval,
        "blocks": arm.blocks,
        "shown": {1: "faster", 0: "nothing", -1: "slower"}[sign],
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the outcomes."""
    naive = [row["naive"]["shown"] for row in rows if row["naive"]]
    ours = [row["delivered"]["shown"] for row in rows if row["delivered"]]
    return {
        "rows": len(rows),
        "naive": {shown: naive.count(shown) for shown in ("faster", "nothing", "slower")},
        "delivered": {shown: ours.count(shown) for shown in ("faster", "nothing", "slower")},
        "dense_delivered": sum(row["outcome"] == "dense" for row in rows),
        "refused": sum(row["outcome"].startswith("refused") for row in rows),
    }


def goals(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Return the goal of the docstring."""
    found = summary(rows)
    if not rows:
        return []
    slower = "; ".join(
        f"{row['net']} batch {row['batch']} threads {row['threads']} at {row['keep_params']:.0%}"
        for row in rows
        if row["delivered"] and row["delivered"]["shown"] == "slower"
    )
    return [
        Goal(
            name="never slower",
            held=not found["delivered"]["slower"],
            row=f"delivered {found['delivered']}, dense {found['dense_delivered']}, refused {found['refused']}; "
            f"naive {found['naive']}{f'; slower: {slower}' if slower else ''}",
        )
    ]


COLUMNS = ("net", "batch", "threads", "kept params", "naive", "delivered", "outcome")


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            row["net"],
            str(row["batch"]),
            str(row["threads"]),
            f"{row['keep_params']:.0%}",
            _told(row["naive"]),
            _told(row["delivered"]),
            row["outcome"],
        ]
        for row in rows
    ]


def _told(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    mark = {"faster": "", "nothing": " (no difference)", "slower": " SLOWER"}[found["shown"]]
    return f"{found['speedup']:.2f}x [{low:.2f}, {high:.2f}]{mark}"


def markdown(rows: Sequence[Mapping[str, Any]], skipped: Mapping[str, str], made: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table, with the command, the counts and what was skipped."""
    machine = made["machine"]
    lines = [f"`{made['command']}`", f"{machine['cpu']}, {machine['cores']} cores; load {machine['load_average']}"]
    lines += [goal.row for goal in goals(rows)]
    lines += [f"Skipped: {name}: {reason}" for name, reason in skipped.items()]
    return "\n\n".join(lines) + "\n\n" + common.markdown_table(COLUMNS, _cells(rows))


if __name__ == "__main__":
    common.run(main)
