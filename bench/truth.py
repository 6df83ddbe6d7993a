"""Does the output quality that an export reports hold on samples that the export has not seen?

Every net is exported at several budgets (`rsi_deploy.export`, calibrated), and the report's agreement with the dense
model on its check part (for the sentence encoder: the mean cosine) is compared with that on test samples.

    reported    on the check part, with its 95 % interval
    in-sample   on the samples that the factors are fitted to
    test        on samples that no export reads

Calibration data are samples of the same kind as the test samples: every second test image of CIFAR-10 calibrates and
the others test; lite0 and minilm as in `bench.cases`. Rows of "training images" calibrate with images that the net was
trained on: they show by how much such images overstate the quality, and are not judged.

Goal (`--check` exits 4 when it is missed): the test value lies within the reported interval in at least 18 of the 20
cells (5 nets, 4 shares of the MACs), or in as large a share of those that were measured. A refused budget is a miss.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench import cases, common
from bench.cases import Array, Case
from bench.common import Goal
from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.evaluation.intervals import mean_interval, wilson_interval
from rsi_deploy.evaluation.scores import log_probabilities
from rsi_deploy.exporting.api import export_run
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.report.schema import Report

NETS = ("resnet20", "resnet56", "cnn_cifar10", "minilm", "lite0")
KEEPS = (0.9, 0.8, 0.7, 0.5)
CIFAR = ("resnet20", "resnet56", "cnn_cifar10")
NEED = 18 / 20
QUICK_NETS, QUICK_KEEPS, QUICK_SIZE = ("cnn_cifar10",), (0.7, 0.5), 400

Data = Literal["new", "training images"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net at one budget; agreements in percent, cosines from -1 to 1.

    Attributes:
        net: one of `NETS`.
        keep: share of the MACs that the budget allows.
        data: calibration data.
        measure: "agreement" or "cosine".
        reported: value on the check part; None if the budget is refused.
        interval: 95 % interval of `reported`.
        in_sample: value on samples of the fit part.
        test: value on the test samples.
        test_interval: 95 % interval of `test`.
        checked: number of samples of the check part.
        tested: number of test samples.
        confidence: mean largest probability of the dense model on the check part; None for embeddings.
        test_confidence: likewise on the test samples.
        kept: share of the MACs that the written model has.
        refused: reason why there is no model; "" if there is one.
        seconds: wall-clock seconds of the export.
    """

    net: str
    keep: float
    data: Data
    measure: Literal["agreement", "cosine"]
    reported: float | None = None
    interval: tuple[float, float] | None = None
    in_sample: float | None = None
    test: float | None = None
    test_interval: tuple[float, float] | None = None
    checked: int = 0
    tested: int = 0
    confidence: float | None = None
    test_confidence: float | None = None
    kept: float | None = None
    refused: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Return whether the test value lies within the reported interval."""
        if self.interval is None or self.test is None:
            return False
        return self.interval[0] <= self.test <= self.interval[1]


def of_the_same_kind(case: Case) -> Case:
    """Return a CIFAR net whose calibration samples are every second test sample; the others test."""
    return replace(
        case,
        pool={name: array[::2] for name, array in case.test.items()},
        size=len(case.reference[::2]),
        test={name: array[1::2] for name, array in case.test.items()},
        reference=case.reference[1::2],
    )


def measure(case: Case, data: Data, keeps: Sequence[float]) -> Iterator[Row]:
    """Export a net at every budget and compare the report with the test samples.

    The exports share one calibration, as the points of a sweep do.
    """
    folder = case.path.parent
    kept = SweepCache.of(folder / f"{case.name} {data}", "truth")
    dense = cases.outputs_of(case.path, case.test)
    rows = np.arange(case.size) * case.available // case.size
    calib = {name: array[rows] for name, array in case.pool.items()}
    for number, keep in enumerate(keeps):
        config = ExportConfig.of(None, keep_macs=keep, calib=calib, measure=False, allow_larger=True, allow_broken=True)
        bundle, started = folder / f"{case.name} {data} {number}", time.perf_counter()
        kind: Literal["agreement", "cosine"] = "cosine" if case.name == "minilm" else "agreement"
        row = Row(net=case.name, keep=keep, data=data, measure=kind)
        try:
            report = export_run(str(case.path), config, kept=kept).write_bundle(bundle, force=False)
        except UsageError:
            raise  # a fault of this script
        except RsiDeployError as error:
            row = replace(row, refused=str(error), seconds=time.perf_counter() - started)
        else:
            outputs = cases.outputs_of(bundle / "model.onnx", case.test)
            row = compared(row, report, dense, outputs, seconds=time.perf_counter() - started)
        said = row.refused or f"{row.reported:.4g}, in-sample {row.in_sample:.4g}, test {row.test:.4g}"
        common.progress(f"{case.name} at {keep:g}, {data}: {said} ({row.seconds:.0f} s)")
        yield row


def compared(row: Row, report: Report, dense: Array, outputs: Array, *, seconds: float) -> Row:
    """Return the row with the values of a report and those of the test outputs `(N, ...)` of both models."""
    record = report.calibration
    if record is None or record.checked is None:
        raise UsageError(f"{row.net}: the report has no check part; give more calibration samples")
    values = _same_answers(dense, outputs) if row.measure == "agreement" else _cosines(dense, outputs)
    hits = int(values.sum())
    return replace(
        row,
        reported=getattr(record.checked, row.measure),
        interval=getattr(record.checked, f"{row.measure}_interval"),
        in_sample=getattr(record.in_sample, row.measure),
        test=100 * hits / len(values) if row.measure == "agreement" else float(values.mean()),
        test_interval=wilson_interval(hits, len(values)) if row.measure == "agreement" else mean_interval(values),
        checked=record.check_samples,
        tested=len(values),
        confidence=record.checked.confidence,
        test_confidence=_confidence(dense) if row.measure == "agreement" else None,
        kept=report.compressed.macs / report.dense.macs,
        seconds=seconds,
    )


def _same_answers(dense: Array, outputs: Array) -> Array:
    """Return whether each sample has the same top-1 answer, bool `(N,)`."""
    return np.asarray(dense.argmax(axis=1) == outputs.argmax(axis=1))


def _cosines(dense: Array, outputs: Array) -> Array:
    """Return the cosine of each sample's unit embeddings, float64 `(N,)`."""
    return (dense.astype(np.float64) * outputs).sum(axis=1)


def _confidence(scores: Array) -> float:
    """Return the mean largest probability."""
    return float(np.exp(log_probabilities(scores).max(axis=1)).mean())


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return the goal on the rows that calibrate with new samples, and on its largest part that was measured."""
    cells = [row for row in rows if row.data == "new"]
    held = sum(row.holds for row in cells)
    need = math.ceil(round(NEED * len(cells), 6))
    missed = ", ".join(f"{row.net} at {row.keep:g}" for row in cells if not row.holds)
    said = f"{held} of {len(cells)} cells, goal {need}" + (f"; outside: {missed}" if missed else "")
    return [Goal(name="the reported value holds on new samples", held=bool(cells) and held >= need, row=said)]


COLUMNS = (
    "net",
    "MACs",
    "calibration data",
    "value",
    "reported",
    "interval",
    "test",
    "holds",
    "in-sample",
    "confidence",
)


def _cells(row: Row) -> list[str]:
    begin = [row.net, f"{row.keep:g}", row.data, row.measure]
    if row.reported is None or row.interval is None or row.test is None or row.in_sample is None:
        return [*begin, "refused", "", "", "no", "", ""]
    form = "{:.1f}" if row.measure == "agreement" else "{:.4f}"
    return [
        *begin,
        f"{form.format(row.reported)} ({row.checked})",
        " to ".join(map(form.format, row.interval)),
        f"{form.format(row.test)} ({row.tested})",
        ("yes" if row.holds else "no") + ("" if row.data == "new" else ", not judged"),
        form.format(row.in_sample),
        "" if row.confidence is None else f"{row.confidence:.3f}, test {row.test_confidence:.3f}",
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    return common.markdown_table(COLUMNS, [_cells(row) for row in rows])


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.truth")
    options.add_argument("--nets", nargs="+", choices=NETS, help="only these (default: all)")
    options.add_argument("--keeps", nargs="+", type=float, metavar="SHARE", help="budgets (default: the goal's)")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    keeps = args.keeps or (QUICK_KEEPS if args.quick else KEEPS)
    if not all(0 < keep < 1 for keep in keeps):
        raise UsageError(f"--keeps lie in (0, 1), but got {keeps}")
    settings: dict[str, Any] = {"quick": args.quick, "keeps": list(keeps)}
    names = args.nets or (QUICK_NETS if args.quick else NETS)
    rows = common.measured_nets(names, settings, lambda name: _measured(name, keeps, quick=args.quick))
    stored = [asdict(row) | {"holds": row.holds} for row in rows]
    return common.finish("bench.truth", arguments, args, settings, markdown(rows), judged(rows), rows=stored)


def _measured(name: str, keeps: Sequence[float], *, quick: bool) -> list[Row]:
    """Return the rows of one net."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        case = cases.load(name, Path(folder))
        same = of_the_same_kind(case) if name in CIFAR else case
        if quick:
            return list(measure(replace(same, size=min(same.size, QUICK_SIZE)), "new", keeps))
        rows = list(measure(same, "new", keeps))
        if name in CIFAR:
            trained = replace(case, test=same.test, reference=same.reference)
            rows += measure(trained, "training images", keeps)
        return rows


if __name__ == "__main__":
    common.run(main)
