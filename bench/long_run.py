"""Do memory, threads, open files and verdicts of a process stay the same over hours?

    exports    the digits CNN exported again and again in one process, the torch way and the ONNX way in turns, each
               with evaluation data and a look at the latency; after each: memory without shared pages (USS), threads,
               open files
    verdict    (`--minutes M`) a dense model and its split beside each other in windows of 20 s for M minutes, in one
               process: what each window says

Warm-up is a tenth of the exports, 20 at most; what is compared is the median of the last 20 with that of the 20 after
the warm-up (with fewer exports: of quarters).

Memory is measured twice: `resident` as it is, and `bytes` after a garbage collection and `malloc_trim`. The first
varies by hundreds of megabytes with the memory that the allocator keeps for later. The second grows with a leak, and is
judged.

Goals (`--check` exits 4 when one is missed): 200 exports grow memory by no more than 5 %; threads and open files do not
grow at all; every window gives the same verdict.
"""

import contextlib
import ctypes
import gc
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

import rsi_deploy
from bench import common, small
from bench.common import Goal

EXPORTS, QUICK_EXPORTS = 200, 8
WINDOW = 20.0
GROWTH = 0.05
SAMPLES = Path(rsi_deploy.__file__).parents[1] / "samples"


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.long_run")
    options.add_argument("--exports", type=int, default=EXPORTS, metavar="N", help=f"[default: {EXPORTS}]")
    options.add_argument("--minutes", type=float, default=0.0, metavar="M", help="of the verdict's arm [default: none]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    exports = min(args.exports, QUICK_EXPORTS) if args.quick else args.exports
    if args.quick:
        common.progress(f"quick: {exports} exports")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        marks = exported(Path(folder), exports) if exports else []
        windows = judged(Path(folder), args.minutes) if args.minutes else []
    rows = compared(marks)
    text = (common.markdown_table(COLUMNS, [_cells(row) for row in rows]) if rows else "") + _told(windows)
    common.console().print(text, soft_wrap=True)
    settings = {"exports": len(marks), "minutes": args.minutes, "window": WINDOW}
    found = {"rows": rows, "marks": marks, "windows": windows}
    common.write(args.json, common.document("bench.long_run", arguments, settings, **found))
    common.write(args.markdown, text)
    return common.judge(goals(rows, windows), args.check)


def exported(folder: Path, count: int) -> list[dict[str, float]]:
    """Return bytes, threads, open files and seconds after each export; Ctrl-C ends the run with the exports made."""
    data = SAMPLES / "digits_eval.npz"
    settings: dict[str, Any] = {
        "rank": "25%",
        "data": data,
        "bench_seconds": 0.2,
        "allow_slower": True,
        "force": True,
    }
    rsi_deploy.export(*torch_way(), folder / "first", **weights(), **settings, keep_dense=True)
    marks = []
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(count):
            started = time.monotonic()
            if number % 2:
                rsi_deploy.export(str(folder / "first" / "dense.onnx"), folder / "onnx", **settings)
            else:
                rsi_deploy.export(*torch_way(), folder / "torch", **weights(), **settings)
            marks.append({**held(), "seconds": round(time.monotonic() - started, 3)})
            if number % 20 == 19:
                common.progress(f"{number + 1} of {count}: {marks[-1]}")
    return marks


def torch_way() -> tuple[str]:
    """The model that is exported."""
    return ("samples.digits:cnn",)


def weights() -> dict[str, Any]:
    """Return the path of its weights."""
    return {"checkpoint": SAMPLES / "digits_cnn.safetensors"}


def held() -> dict[str, float]:
    """Return memory, threads and open files of this process."""
    process = psutil.Process()
    resident = process.memory_full_info().uss
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return {
        "bytes": process.memory_full_info().uss,
        "resident": resident,
        "threads": process.num_threads(),
        "files": process.num_fds(),
    }


def judged(folder: Path, minutes: float) -> list[dict[str, Any]]:
    """Return the speedup of each window, with memory, threads and open files after it."""
    dense, split = small.perceptron(folder / "dense.onnx", width=512, layers=4), folder / "split.onnx"
    rsi_deploy.rewrite(dense, split, rank="20%")
    end, windows = time.monotonic() + 60 * minutes, []
    while time.monotonic() < end or not windows:
        result = rsi_deploy.bench([dense, split], seconds=WINDOW, precision=1e-6, threads=1, seed=len(windows))
        arm = result.arms[1]
        ends = arm.speedup_interval or (0.0, 0.0)
        kind = "faster" if ends[0] > 1.01 else "slower" if ends[1] < 0.99 else "no difference shown"
        windows.append({"speedup": arm.speedup, "interval": ends, "kind": kind, "blocks": arm.blocks, **held()})
        if len(windows) % 3 == 0:
            common.progress(f"{len(windows)} windows: {windows[-1]}")
    return windows


def compared(marks: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Return each quantity after the warm-up and at the end."""
    count = len(marks)
    first = min(20, count // 10)
    width = min(20, max(1, count // 4))
    rows = []
    for what in ("bytes", "resident", "threads", "files") if marks else ():
        values = [mark[what] for mark in marks]
        before, after = (float(np.median(part)) for part in (values[first : first + width], values[-width:]))
        most = max(values[first:])
        rows.append({"what": what, "before": before, "after": after, "most": most, "growth": after / before - 1})
    return rows


COLUMNS = ("held", "after the warm-up", "at the end", "most", "growth")


def _cells(row: dict[str, Any]) -> list[str]:
    unit = 1e6 if row["what"] in ("bytes", "resident") else 1
    numbers = [f"{row[key] / unit:,.1f}{' MB' * (unit > 1)}" for key in ("before", "after", "most")]
    return [row["what"], *numbers, f"{100 * row['growth']:+.1f} %"]


def _told(windows: Sequence[dict[str, Any]]) -> str:
    if not windows:
        return ""
    kinds = {kind: sum(w["kind"] == kind for w in windows) for kind in dict.fromkeys(w["kind"] for w in windows)}
    speedups = [w["speedup"] for w in windows]
    return (
        f"\n{len(windows)} windows of {WINDOW:g} s: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; speedup "
        f"{min(speedups):.2f} to {max(speedups):.2f}, median {float(np.median(speedups)):.2f}\n"
    )


def goals(rows: Sequence[dict[str, Any]], windows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring."""
    found = []
    for row in rows:
        if row["what"] == "resident":
            continue
        limit = GROWTH if row["what"] == "bytes" else 0.0
        found.append(
            Goal(
                name=f"{row['what']} within {100 * limit:g} %",
                held=row["growth"] <= limit,
                row=", ".join(_cells(row)[1:]),
            )
        )
    if windows:
        kinds = {window["kind"] for window in windows}
        flat = {key: {window[key] for window in windows[1:]} for key in ("threads", "files")}
        found.append(Goal(name="one verdict", held=len(kinds) == 1, row=_told(windows).strip()))
        found.append(
            Goal(
                name="threads and files of the windows",
                held=all(len(values) <= 1 for values in flat.values()),
                row=str({key: sorted(values) for key, values in flat.items()}),
            )
        )
    return found


if __name__ == "__main__":
    common.run(main)
