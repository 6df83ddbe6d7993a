"""Are the verdicts of `rsi-deploy bench` right on a noisy machine?

    A/A   one model as both arms: anything but "no difference shown" is a false alarm
    A/B   the same, and every call of the second arm is followed by a busy loop of 5 % of the first arm's median, taken
          in a run of its own: a slowdown of 1.05x that is known, and must be found with the right sign

Each run is a whole measurement: sessions made anew, arms warmed up, shuffled blocks until the precision or the time.
Another process keeps one core busy; by default the arms use one thread (`--threads`), since a machine of two cores has
one core left.

Goals (`--check` exits 4 when one is missed): of 20 runs, A/A gives "no difference shown" in at least 19, and A/B finds
the difference in at least 18.
"""

import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bench import common, small
from bench.common import Goal
from rsi_deploy.benchmark import latency
from rsi_deploy.benchmark.blocks import Cell, run_cells
from rsi_deploy.benchmark.variants import Runtime, Variant, open_variants
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds

RUNS, QUICK_RUNS = 20, 3
SLOWER = 0.05
ALLOWED_ALARMS, ALLOWED_MISSES = 1, 2  # of 20
WIDTH, LAYERS = 512, 3  # of the model


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.method_check")
    options.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"of each kind [default: {RUNS}]")
    options.add_argument("--seconds", type=float, default=10.0, help="at most, per run [default: 10]")
    options.add_argument("--threads", type=int, default=1, help="of each arm; 0: onnxruntime's default [default: 1]")
    options.add_argument("--batch", type=int, default=16, help="[default: 16]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    runs = min(args.runs, QUICK_RUNS) if args.quick else args.runs
    seconds = min(args.seconds, 4.0) if args.quick else args.seconds
    if args.quick:
        common.progress(f"quick: {runs} runs of {seconds:g} s of each kind")
    runtime = Runtime(threads=args.threads or None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, busy_core():
        model = small.perceptron(Path(folder) / "model.onnx", width=WIDTH, layers=LAYERS)
        for seed in range(runs):
            for kind in ("A/A", "A/B"):
                rows.append(row(kind, seed, measured(model, runtime, kind, seed, seconds, args.batch)))
                common.progress(f"{kind} {seed + 1}/{runs}: {rows[-1]['verdict']} in {rows[-1]['seconds']:.1f} s")
    common.console().print(table(rows))
    settings = {"runs": runs, "seconds": seconds, "threads": args.threads, "batch": args.batch, "slower": SLOWER}
    common.write(args.json, common.document("bench.method_check", arguments, settings, rows=rows))
    common.write(args.markdown, common.markdown_table(COLUMNS, [_cells(kind, rows) for kind in ("A/A", "A/B")]))
    return common.judge(goals(rows), args.check)


def measured(model: Path, runtime: Runtime, kind: str, seed: int, seconds: float, batch: int) -> latency.BenchResult:
    """One whole run of two arms, both of the one model."""
    sessions = [runtime.session(model) for _ in range(2)]
    specs = model_inputs(sessions[0])
    feeds = random_feeds(specs, batch, seed)
    arms = open_variants([model, model], ["first", "second"], sessions, feeds, runtime)
    for arm in arms:
        arm.warm_up(seconds / 4)
    if kind == "A/B":
        arms[1].call = slowed(arms[1].call, SLOWER * calm_ms(arms[0], seconds / 4))
    cell = Cell(name=kind, variants=arms)
    if run_cells([cell], seconds=seconds, precision=latency.PRECISION, seed=seed):
        raise KeyboardInterrupt
    return latency.cell_result(
        cell, specs, feeds, runtime, batch=batch, seed=seed, precision=latency.PRECISION, interrupted=False
    )


def calm_ms(arm: Variant, seconds: float) -> float:
    """Return the median call of an arm over a quarter of a run's time, which sets the length of the busy loop."""
    end, times = time.monotonic() + seconds, []
    while not times or time.monotonic() < end:
        times.append(float(np.median(arm.visit())))
    return float(np.median(times))


def slowed(call: Callable[[], object], extra_ms: float) -> Callable[[], None]:
    """Return the call followed by a busy loop of `ms` milliseconds."""
    clock, wait = time.perf_counter_ns, int(extra_ms * 1e6)

    def slow() -> None:
        call()
        end = clock() + wait
        while clock() < end:
            pass

    return slow


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _spin() -> None:
    numbers = np.ones((256, 256), np.float32)
    while True:
        numbers.sum()


def row(kind: str, seed: int, result: latency.BenchResult) -> dict[str, Any]:
    """Return the row of one run: its verdict, and whether that is right."""
    first, second = result.arms
    pattern = r"no difference shown" if kind == "A/A" else r"\S+x slower"
    return {
        "kind": kind,
        "seed": seed,
        "right": bool(re.match(pattern, second.verdict)),
        "verdict": second.verdict,
        "speedup": second.speedup,
        "interval": second.speedup_interval,
        "median_ms": first.median_ms,
        "blocks": second.blocks,
        "seconds": result.seconds,
        "stopped": result.stopped,
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring, in proportion for fewer runs."""
    found = []
    for kind, allowed in (("A/A", ALLOWED_ALARMS), ("A/B", ALLOWED_MISSES)):
        of_kind = [r for r in rows if r["kind"] == kind]
        wrong = sum(not r["right"] for r in of_kind)
        found.append(
            Goal(
                name=f"{kind}: {'no difference shown' if kind == 'A/A' else 'a slowdown of 5 % found'}",
                held=wrong <= allowed * len(of_kind) / RUNS,
                row=f"{len(of_kind) - wrong} of {len(of_kind)}, goal {RUNS - allowed} of {RUNS}",
            )
        )
    return found


COLUMNS = ("kind", "right", "runs", "speedups, least to most", "median blocks", "median seconds", "ended precise")


def _cells(kind: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    of_kind = [r for r in rows if r["kind"] == kind]
    speedups = [r["speedup"] for r in of_kind]
    return [
        kind,
        str(sum(r["right"] for r in of_kind)),
        str(len(of_kind)),
        f"{min(speedups):.3f} to {max(speedups):.3f}",
        f"{np.median([r['blocks'] for r in of_kind]):.0f}",
        f"{np.median([r['seconds'] for r in of_kind]):.1f}",
        str(sum(r["stopped"] == "precise" for r in of_kind)),
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a kind, for the terminal."""
    result = Table(*COLUMNS)
    for kind in ("A/A", "A/B"):
        result.add_row(*_cells(kind, rows))
    return result


if __name__ == "__main__":
    common.run(main)
