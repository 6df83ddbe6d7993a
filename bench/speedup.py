"""How much faster does the compressed model run than the dense one, on this machine's CPU provider?

Torchvision models with random weights (speed does not depend on their values) are exported at `--rank 25%`; dense and
compressed run interleaved in shuffled blocks in one process (`rsi_deploy.bench`), at batch 1 and 8. The factor is
dense over compressed median time with its 95 % bootstrap interval; slowdowns are shown as they are.

Goal (`--check` exits 4 when it is missed): VGG19 at 25 %, batch 8, is at least 2.5 times faster.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import common
from bench.common import Goal
from rsi_deploy.measure.latency import MIN_BLOCKS, bench
from rsi_deploy.pipeline import export

MODELS = ("vgg19", "vit_b_32", "resnet18", "mobilenet_v2", "convnext_tiny")
BATCHES = (1, 8)
RANK = "25%"
GOAL_MODEL, GOAL_BATCH, GOAL_SPEEDUP = "vgg19", 8, 2.5


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.speedup")
    options.add_argument("--models", nargs="+", metavar="NAME", help="torchvision models")
    options.add_argument("--seconds", type=float, default=30.0, help="per model and batch [default: 30]")
    given = options.parse_args(arguments)
    common.check_writable(given.json, given.markdown)
    names = tuple(given.models or (MODELS[-2:] if given.quick else MODELS))
    seconds = min(given.seconds, 5.0) if given.quick else given.seconds
    if given.quick:
        common.progress(f"quick: {', '.join(names)}, {seconds:g} s a row")
    rows: list[dict[str, Any]] = []
    for name in names:
        common.progress(f"{name}: exporting")
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
            bundle = Path(folder) / name
            report = export(f"torchvision:{name}", bundle, rank=RANK, weights="none", measure=False, keep_dense=True)
            for batch in BATCHES:
                common.progress(f"{name}: batch {batch}")
                result = bench(
                    [bundle / "dense.onnx", bundle / "model.onnx"],
                    batch=batch,
                    seconds=seconds,
                    labels=["dense", "compressed"],
                )
                rows.append(row(name, batch, report.compressed, report.dense, result))
    common.console().print(table(rows))
    settings = {"rank": RANK, "models": names, "batches": BATCHES, "seconds": seconds}
    common.write(given.json, common.document("bench.speedup", arguments, settings, rows=rows))
    common.write(given.markdown, markdown(rows))
    return common.judge(goals(rows), given.check)


def row(name: str, batch: int, compressed: Any, dense: Any, result: Any) -> dict[str, Any]:
    """One line: sizes as shares of the dense model, both medians, the factor and its interval."""
    first, second = result.arms
    return {
        "model": name,
        "batch": batch,
        "kept_params": compressed.params / dense.params,
        "kept_macs": compressed.macs / dense.macs,
        "dense_ms": first.median_ms,
        "compressed_ms": second.median_ms,
        "speedup": second.speedup,
        "interval": second.speedup_interval,
        "verdict": second.verdict,
        "blocks": second.blocks,
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goal of the docstring, where its row was measured."""
    return [
        Goal(
            name=f"{GOAL_MODEL} at {RANK}, batch {GOAL_BATCH}",
            held=r["blocks"] >= MIN_BLOCKS and r["speedup"] >= GOAL_SPEEDUP,
            row=f"{r['verdict']}, goal {GOAL_SPEEDUP}x",
        )
        for r in rows
        if r["model"] == GOAL_MODEL and r["batch"] == GOAL_BATCH
    ]


COLUMNS = ("model", "batch", "kept params", "kept MACs", "dense ms", "compressed ms", "verdict")


def _cells(r: dict[str, Any]) -> list[str]:
    return [
        r["model"],
        str(r["batch"]),
        f"{r['kept_params']:.1%}",
        f"{r['kept_macs']:.1%}",
        f"{r['dense_ms']:.2f}",
        f"{r['compressed_ms']:.2f}",
        r["verdict"],
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal."""
    result = Table(*COLUMNS)
    for r in rows:
        result.add_row(*_cells(r))
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    return common.markdown_table(COLUMNS, [_cells(r) for r in rows])


if __name__ == "__main__":
    common.run(main)
