"""How much time does measuring add to a call, compared with a bare loop of `run_with_iobinding`?

A model of one ReLU on four numbers, one thread, CPU provider. Three arms take turns in shuffled rounds in one process:

    bare        a Python loop of `session.run_with_iobinding(binding)`, its total time over its calls
    recorded    the recorded time of a call: `benchmark.timing.time_calls` of a `runtime.binding.bound_call`
    whole       the time that loop takes, clock readings included, over its calls

Each round compares with its own bare loop; shown is the median over the rounds of the difference, with a 95 % bootstrap
interval. Reported latencies are too long by `recorded`; `whole` is the whole cost of measuring.

Goal (`--check` exits 4 when it is missed): the harness adds less than 3 microseconds to a call, recorded and whole.
"""

import gc
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from bench import common, small
from bench.common import Goal
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.runtime.binding import bound_call
from rsi_deploy.runtime.sessions import make_session

LIMIT_US = 3.0
CALLS = 200  # half a millisecond: most rounds go by between two turns of another process
ROUNDS, QUICK_ROUNDS = 4000, 600
ARMS = ("bare", "recorded", "whole")

Floats = npt.NDArray[np.float64]


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.overhead")
    options.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"[default: {ROUNDS}]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    rounds = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    if args.quick:
        common.progress(f"quick: {rounds} rounds")
    times = measure(rounds)
    rows = [row(arm, times) for arm in ARMS]
    common.console().print(table(rows))
    settings = {"rounds": rounds, "calls": CALLS, "provider": "cpu:threads=1"}
    common.write(args.json, common.document("bench.overhead", arguments, settings, rows=rows))
    common.write(args.markdown, common.markdown_table(COLUMNS, [_cells(r) for r in rows]))
    return common.judge(goals(rows), args.check)


def measure(rounds: int) -> dict[str, Floats]:
    """Microseconds a call of each arm in each round: arm -> float64 `(rounds,)`."""
    from onnxruntime import OrtValue

    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        session = make_session(small.trivial(Path(folder) / "trivial.onnx"), "cpu:threads=1")
    feeds = {"x": np.ones((1, 4), np.float32)}
    call = bound_call(session, feeds)
    value, output = (OrtValue.ortvalue_from_numpy(np.ones((1, 4), np.float32)) for _ in range(2))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_ortvalue_output("y", output)

    def bare() -> None:
        run = session.run_with_iobinding
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            run(binding)
        times["bare"].append((time.perf_counter_ns() - start) / CALLS / 1e3)

    def harness() -> None:
        start = time.perf_counter_ns()
        recorded = time_calls(call, CALLS)
        times["whole"].append((time.perf_counter_ns() - start) / CALLS / 1e3)
        times["recorded"].append(float(recorded.mean()) / 1e3)  # a mean, as a loop's total over its calls is one

    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    bare(), harness()  # warm-up, dropped
    times = {arm: [] for arm in ARMS}
    gc.disable()
    for _ in range(rounds):
        for arm in order.sample((bare, harness), 2):
            arm()
    gc.enable()
    return {arm: np.asarray(values) for arm, values in times.items()}


def row(arm: str, times: dict[str, Floats]) -> dict[str, Any]:
    """Return the median of one arm, and its excess over the bare loop of the same round."""
    added = times[arm] - times["bare"]
    rng = np.random.default_rng(0)
    resampled = np.median(added[rng.integers(0, len(added), (2000, len(added)))], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "arm": arm,
        "call_us": float(np.median(times[arm])),
        "added_us": float(np.median(added)),
        "interval_us": (float(low), float(high)),
        "rounds": len(added),
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goal of the docstring; it must hold at the upper end of the interval."""
    return [
        Goal(
            name=f"{r['arm']} adds less than {LIMIT_US:g} us to a call",
            held=r["interval_us"][1] < LIMIT_US,
            row=f"{r['added_us']:.2f} us [{r['interval_us'][0]:.2f}, {r['interval_us'][1]:.2f}]",
        )
        for r in rows
        if r["arm"] != "bare"
    ]


COLUMNS = ("arm", "call us", "added us", "95 % interval", "rounds")


def _cells(r: dict[str, Any]) -> list[str]:
    low, high = r["interval_us"]
    added = ["", ""] if r["arm"] == "bare" else [f"{r['added_us']:.2f}", f"{low:.2f} to {high:.2f}"]
    return [r["arm"], f"{r['call_us']:.2f}", *added, str(r["rounds"])]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS)
    for r in rows:
        result.add_row(*_cells(r))
    return result


if __name__ == "__main__":
    common.run(main)
