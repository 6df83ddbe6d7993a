"""Does a model whose size a quality budget decides keep that quality on samples that the export has not seen?

Every net is exported with `--min-agreement` (the sentence encoder: `--min-cosine`) at two qualities. The delivered
model is compared with the dense one on test samples, which no export reads. Calibration data are of the same kind, as
in `bench.truth`.

    bound    one-sided 95 % limit on the check part, which the search keeps at or above the quality
    test     value on the test samples
    next     limit of the next smaller model that the search tried

Goals (`--check` exits 4 when one is missed): the test value is at least the quality in 9 of 10 cells, and the next
smaller model that was tried misses the quality on the check part in more than half of the cells.
"""

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import cases, common
from bench.cases import Case
from bench.common import Goal
from bench.truth import CIFAR, of_the_same_kind
from rsi_deploy import export
from rsi_deploy.core.errors import UsageError

NETS = ("resnet20", "resnet56", "cnn_cifar10", "mlp_mnist", "minilm")
QUALITIES = (0.97, 0.99)
QUICK_NETS, QUICK_QUALITIES = ("cnn_cifar10",), (0.95,)
NEED = 9 / 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net at one quality; all values are fractions.

    Attributes:
        net: one of `NETS`.
        measure: "agreement" or "cosine".
        quality: quality of the export.
        bound: one-sided limit on the check part.
        test: value on the test samples.
        next_smaller: limit of the next smaller model that was tried; None without any.
        tried: number of models that were fitted.
        kept: share of the parameters that the delivered model has.
        is_dense: whether the dense model is delivered.
        checked: number of samples of the check part.
        tested: number of test samples.
        seconds: wall-clock seconds of the export.
    """

    net: str
    measure: str
    quality: float
    bound: float
    test: float
    next_smaller: float | None
    tried: int
    kept: float
    is_dense: bool
    checked: int
    tested: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Return whether the test samples have the quality."""
        return self.test >= self.quality

    @property
    def is_tight(self) -> bool:
        """Return whether the next smaller model misses the quality on the check part."""
        return self.next_smaller is not None and self.next_smaller < self.quality


def measured(case: Case, quality: float) -> Row:
    """Export a net at a quality and compare it with the dense one on the test samples."""
    measure = "cosine" if case.name == "minilm" else "agreement"
    bundle, started = case.path.parent / f"{case.name} {quality}", time.perf_counter()
    calib = case.draw(0) if case.apart else case.pool
    report = export(str(case.path), bundle, calib=calib, measure=False, **{f"min_{measure}": quality})
    seconds = time.perf_counter() - started
    assert report.calibration is not None
    assert report.plan is not None
    checked = report.calibration.quality
    dense, outputs = (cases.outputs_of(path, case.test) for path in (case.path, bundle / "model.onnx"))
    same = dense.argmax(axis=1) == outputs.argmax(axis=1) if measure == "agreement" else (dense * outputs).sum(axis=1)
    bound = checked.cosine_at_least if measure == "cosine" else (checked.agreement_at_least or 0) / 100
    smaller = report.plan.next_smaller
    return Row(
        net=case.name,
        measure=measure,
        quality=quality,
        bound=bound or 0.0,
        test=float(same.mean()),
        next_smaller=None if smaller is None else smaller.value,
        tried=len(report.plan.trials),
        kept=report.compressed.params / report.dense.params,
        is_dense=report.plan.delivers_dense,
        checked=checked.samples,
        tested=len(same),
        seconds=seconds,
    )


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return both goals, on as many cells as were measured."""
    need = math.ceil(round(NEED * len(rows), 6))
    held, tight = ([row for row in rows if getattr(row, name)] for name in ("holds", "is_tight"))
    below = ", ".join(f"{row.net} at {row.quality:g}: {row.test:.4f}" for row in rows if not row.holds)
    return [
        Goal(
            name="the quality holds on test samples",
            held=bool(rows) and len(held) >= need,
            row=f"{len(held)} of {len(rows)} cells, goal {need}" + (f"; below: {below}" if below else ""),
        ),
        Goal(
            name="the next smaller model misses the quality",
            held=2 * len(tight) > len(rows),
            row=f"{len(tight)} of {len(rows)} cells, goal more than half",
        ),
    ]


COLUMNS = (
    "net",
    "value",
    "quality",
    "bound (samples)",
    "test (samples)",
    "holds",
    "parameters",
    "next smaller",
    "tried",
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = [
        [
            row.net,
            row.measure,
            f"{row.quality:g}",
            f"{row.bound:.4f} ({row.checked})",
            f"{row.test:.4f} ({row.tested})",
            "yes" if row.holds else "no",
            "dense" if row.is_dense else f"{row.kept:.1%}",
            "none" if row.next_smaller is None else f"{row.next_smaller:.4f}",
            str(row.tried),
        ]
        for row in rows
    ]
    return common.markdown_table(COLUMNS, cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.quality_budgets")
    options.add_argument("--nets", nargs="+", choices=NETS, help="only these (default: all)")
    options.add_argument("--qualities", nargs="+", type=float, metavar="SHARE", help="(default: the goal's)")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    qualities = args.qualities or (QUICK_QUALITIES if args.quick else QUALITIES)
    if not all(0 < quality < 1 for quality in qualities):
        raise UsageError(f"--qualities lie in (0, 1), but got {qualities}")
    settings: dict[str, Any] = {"quick": args.quick, "qualities": list(qualities)}
    names = args.nets or (QUICK_NETS if args.quick else NETS)
    rows = common.measured_nets(names, settings, lambda name: _measured(name, qualities, quick=args.quick))
    stored = [asdict(row) | {"holds": row.holds, "is_tight": row.is_tight} for row in rows]
    return common.finish("bench.quality_budgets", arguments, args, settings, markdown(rows), judged(rows), rows=stored)


def _measured(name: str, qualities: Sequence[float], *, quick: bool) -> list[Row]:
    """Return the rows of one net."""
    rows = []
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        case = cases.load(name, Path(folder))
        case = of_the_same_kind(case) if name in CIFAR else case
        if quick:
            case = replace(case, pool={key: array[:400] for key, array in case.pool.items()})
        for quality in qualities:
            rows.append(measured(case, quality))
            common.progress(f"{name} at {quality:g}: test {rows[-1].test:.4f} ({rows[-1].seconds:.0f} s)")
    return rows


if __name__ == "__main__":
    common.run(main)
