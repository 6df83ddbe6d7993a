"""Does a process that goes on for hours stay as it was: its memory, its threads, its open files, its verdicts?

    exports    the digits CNN exported again and again in one process, the torch way and the ONNX way in turns, each
               with evaluation data and a look at the latency; after each: memory without shared pages (USS), threads,
               open files
    verdict    (`--minutes M`) a dense model and its split beside each other in windows of 20 s for M minutes, in one
               process: what each window says

Warm-up is a tenth of the exports, 20 at most; what is compared is the median of the last 20 with that of the 20 after
the warm-up (with fewer exports: of quarters).

Memory is told twice: `resident` as it is, and `bytes` after Python has collected its cycles and the C library has given
back what is free in it (malloc_trim). The first goes up and down by hundreds of megabytes with what the allocator keeps
for later; the second is what grows if anything does, and what is judged.

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
    given = options.parse_args(arguments)
    common.check_writable(given.json, given.markdown)
    exports = min(given.exports, QUICK_EXPORTS) if given.quick else given.exports
    if given.quick:
        common.progress(f"quick: {exports} exports")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        marks = exported(Path(folder), exports) if exports else []
        windows = judged(Path(folder), given.minutes) if given.minutes else []
    rows = compared(marks)
    text = (common.markdown_table(COLUMNS, [_cells(row) for row in rows]) if rows else "") + _told(windows)
    common.console().print(text, soft_wrap=True)
    settings = {"exports": len(marks), "minutes": given.minutes, "window": WINDOW}
    found = {"rows": rows, "marks": marks, "windows": windows}
    common.write(given.json, common.document("bench.long_run", arguments, settings, **found))
    common.write(given.markdown, text)
    return common.judge(goals(rows, windows), given.check)


def exported(folder: Path, count: int) -> list[dict[str, float]]:
    """What the process holds after each export: bytes, threads, open files, seconds; Ctrl-C ends it with those made."""
    data = SAMPLES / "digits_eval.npz"
    asked: dict[str, Any] = {
        "rank": "25%",
        "data": data,
        "bench_seconds": 0.2,
        "allow_slower": True,
        "force": True,
    }
    rsi_deploy.export(*torch_way(), folder / "first", **weights(), **asked, keep_dense=True)
    marks = []
    with contextlib.suppress(KeyboardInterrupt):
        for number in range(count):
            started = time.monotonic()
            if number % 2:
                rsi_deploy.export(str(folder / "first" / "dense.onnx"), folder / "onnx", **asked)
            else:
                rsi_deploy.export(*torch_way(), folder / "torch", **weights(), **asked)
            marks.append({**held(), "seconds": round(time.monotonic() - started, 3)})
            if number % 20 == 19:
                common.progress(f"{number + 1} of {count}: {marks[-1]}")
    return marks


def torch_way() -> tuple[str]:
    """The model that is exported."""
    return ("samples.digits:cnn",)


def weights() -> dict[str, Any]:
    """Where its weights are."""
    return {"checkpoint": SAMPLES / "digits_cnn.safetensors"}


def held() -> dict[str, float]:
    """What this process holds now."""
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
    """The windows' speedups, with what the process holds after each."""
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
    """Each thing held, after the warm-up and at the end."""
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
    """What the docstring promises."""
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
