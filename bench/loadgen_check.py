"""Does the SingleStream p90 of MLPerf LoadGen agree with that of `rsi-deploy bench`?

A perceptron of six 2048x2048 layers, batch 1, one thread, CPU provider. In every round LoadGen runs SingleStream in a
process of its own, in which the tool times the same calls with its own clock; then `rsi_deploy.bench` measures the
model with its own loop. Rounds alternate, so that other work on the machine affects both.

    same calls      LoadGen's p90 over that of the tool's clock around the very same calls; worst round
    own loop        median over the rounds of LoadGen's p90 over the median of `bench`'s p90

Goal (`--check` exits 4 when it is missed): in one run, the two p90 of the same calls agree within 5 %.
The own loop is shown beside it: on a machine that others use, its calls are not the ones that LoadGen timed.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import common, small
from bench.common import Goal
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.benchmark.mlperf.loadgen import run_loadgen

LIMIT = 0.05
ROUNDS, QUICK_ROUNDS = 10, 2
PROVIDER = "cpu:threads=1"


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.loadgen_check")
    options.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"[default: {ROUNDS}]")
    options.add_argument("--seconds", type=float, default=5.0, help="of each measurement in a round [default: 5]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    rounds = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    if args.quick:
        common.progress(f"quick: {rounds} rounds")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        model = small.perceptron(Path(folder) / "perceptron.onnx")
        rows = [measure(model, number, args.seconds) for number in range(rounds)]
    common.console().print(table(rows))
    found = summary(rows)
    common.console().print(f"worst round, same calls: {found['same_calls']:+.1%}; own loop: {found['own_loop']:+.1%}")
    settings = {"rounds": rounds, "seconds": args.seconds, "provider": PROVIDER}
    document = common.document("bench.loadgen_check", arguments, settings, rows=rows, summary=found)
    common.write(args.json, document)
    common.write(args.markdown, common.markdown_table(COLUMNS, [_cells(r) for r in rows]))
    return common.judge(goals(found), args.check)


def measure(model: Path, number: int, seconds: float) -> dict[str, Any]:
    """One round: LoadGen, then the tool's own loop."""
    common.progress(f"round {number + 1}")
    loadgen = run_loadgen(model, "SingleStream", provider=PROVIDER, seconds=seconds, seed=number)
    (arm,) = bench([model], provider=PROVIDER, seconds=seconds, seed=number).arms
    assert loadgen.own_p90_ms is not None
    return {
        "round": number + 1,
        "verdict": "VALID" if loadgen.valid else "INVALID",
        "queries": loadgen.queries,
        "loadgen_p90_ms": loadgen.latency_ms["90"],
        "same_calls_p90_ms": loadgen.own_p90_ms,
        "own_loop_p90_ms": arm.quantiles_ms[90],
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Relative differences of LoadGen's p90 from the tool's two."""
    same = [r["loadgen_p90_ms"] / r["same_calls_p90_ms"] - 1 for r in rows]
    loadgen, own = (statistics.median(r[key] for r in rows) for key in ("loadgen_p90_ms", "own_loop_p90_ms"))
    return {"same_calls": max(same, key=abs), "own_loop": loadgen / own - 1}


def goals(found: dict[str, float]) -> list[Goal]:
    """Return the goal of the docstring."""
    return [
        Goal(
            name=f"p90 of the same calls agree within {LIMIT:.0%}",
            held=abs(found["same_calls"]) <= LIMIT,
            row=f"LoadGen's is {found['same_calls']:+.2%} in the worst round",
        )
    ]


COLUMNS = ("round", "LoadGen", "queries", "LoadGen p90 ms", "same calls p90 ms", "own loop p90 ms")


def _cells(r: dict[str, Any]) -> list[str]:
    times = [f"{r[key]:.3f}" for key in ("loadgen_p90_ms", "same_calls_p90_ms", "own_loop_p90_ms")]
    return [str(r["round"]), r["verdict"], str(r["queries"]), *times]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS)
    for r in rows:
        result.add_row(*_cells(r))
    return result


if __name__ == "__main__":
    common.run(main)
