"""What does storing finished sites cost, and how much does it save the next run?

An ONNX model of six square products (96 MiB of weights at the full size) is rewritten at 25 %, the arms in turns, each
round in shuffled order:

    plain      nothing is stored
    keeping    each finished site is stored, as exports do for models of 64 MiB and more
    going on   a killed run has stored all sites but one

Goals (`--check` exits 4 when one is missed): keeping adds no more than 5 % to the time; going on takes less than half.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rsi_deploy
from bench import common, small
from bench.common import Goal
from rsi_deploy.onnx_models import site_factorizer

ARMS = ("plain", "keeping", "going on")
WIDTH, QUICK_WIDTH = 2048, 512
ROUNDS, QUICK_ROUNDS = 7, 3
LAYERS = 6
COLUMNS = ("arm", "median", "least", "most", "to plain")


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.resume_cost")
    options.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"[default: {ROUNDS}]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    width = QUICK_WIDTH if args.quick else WIDTH
    rounds = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    if args.quick:
        common.progress(f"quick: {rounds} rounds at width {width}")
    times = measured(width, rounds)
    plain = float(np.median(times["plain"]))
    rows = [_row(arm, times[arm], plain) for arm in ARMS]
    text = common.markdown_table(COLUMNS, [_cells(row) for row in rows])
    common.console().print(text, soft_wrap=True)
    settings = {"width": width, "layers": LAYERS, "rounds": rounds}
    common.write(args.json, common.document("bench.resume_cost", arguments, settings, rows=rows, times=times))
    common.write(args.markdown, text)
    return common.judge(goals(rows), args.check)


def measured(width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round; the first round, a warm-up, is dropped."""
    order = random.Random(0)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as name:
        folder = Path(name)
        source = small.perceptron(folder / "m.onnx", width=width, layers=LAYERS)
        target = folder / "out.onnx"
        left = _killed(source, folder)
        for number in range(rounds + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                if arm == "going on":
                    shutil.copytree(left, folder / f".{target.name}.partial")
                started = time.perf_counter()
                rsi_deploy.rewrite(source, target, rank="25%", joint=False, resume=arm != "plain")
                times[arm] += [time.perf_counter() - started] if number else []
                target.unlink()
    return times


def _killed(source: Path, folder: Path) -> Path:
    """Return the folder of a run that is killed at its last site."""
    target, real = folder / "out.onnx", site_factorizer.factorize_site

    def dying(*args: Any, name: str, **kwargs: Any) -> Any:
        if name == f"w{LAYERS - 1}":
            raise KeyboardInterrupt
        return real(*args, name=name, **kwargs)

    site_factorizer.factorize_site = dying
    try:
        rsi_deploy.rewrite(source, target, rank="25%", joint=False, resume=True)
    except KeyboardInterrupt:
        pass
    finally:
        site_factorizer.factorize_site = real
    return (folder / f".{target.name}.partial").rename(folder / "left")


def _row(arm: str, seconds: Sequence[float], plain: float) -> dict[str, Any]:
    median = float(np.median(seconds))
    return {"arm": arm, "median": median, "least": min(seconds), "most": max(seconds), "ratio": median / plain}


def _cells(row: dict[str, Any]) -> list[str]:
    return [row["arm"], *(f"{row[key]:.3f} s" for key in ("median", "least", "most")), f"{row['ratio']:.3f}"]


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring."""
    ratios = {row["arm"]: row["ratio"] for row in rows}
    return [
        Goal(name="keeping", held=ratios["keeping"] <= 1.05, row=f"{ratios['keeping']:.3f} of the plain time"),
        Goal(name="going on", held=ratios["going on"] < 0.5, row=f"{ratios['going on']:.3f} of the plain time"),
    ]


if __name__ == "__main__":
    common.run(main)
