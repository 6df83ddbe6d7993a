"""Is a model that `export --precision auto` delivers ever dominated by onnxruntime's own quantization?

Every net is exported at 6 budgets of bytes and 4 of time (shares of the dense file, and of its time for a call of one
sample). The rivals are made once per net from the same calibration data: static int8 (minmax ranges, uint8
activations, int8 weights per channel), dynamic int8 per channel and int4 (MatMulNBits, block 32); float16 on CUDA.

    answers   top-1 against the labels on test samples, which no export reads; for the sentence encoder the cosine to
              the dense embeddings, and the share of common nearest neighbours beside it
    time      one interleaved run of the dense model, all rivals and all delivered models of a net: batch 1, real inputs

A rival dominates a delivered model if all of these hold:

    bytes     it is no larger
    time      it is not measurably slower: the upper end of its speed-up's 99 % interval reaches the other's lower end
    answers   it is better, and the 95 % interval of the paired difference lies above 0

Where the export refuses a budget, a rival dominates if it keeps the budget (of time: its whole interval does).
Calibration data are of the same kind as the test samples, as in `bench.truth`.

Goal (`--check` exits 4 when it is missed): no cell of `auto` is dominated. Rows of `float32` (`--float32`) show how
often low rank alone is; they are not judged.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from bench import cases, common
from bench.cases import Array, Case, Inputs
from bench.common import Goal
from bench.truth import CIFAR, of_the_same_kind
from rsi_deploy.benchmark import latency
from rsi_deploy.benchmark.matrix import variant_file
from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.intervals import difference_interval, mean_interval, wilson_interval
from rsi_deploy.exporting.api import export_run
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.precision.rivals import Rival, make_rivals, rival_schemes
from rsi_deploy.runtime.providers import short_name_of_user

NETS = ("resnet20", "resnet56", "cnn_cifar10", "lite0", "minilm")
BYTES = (0.5, 0.3, 0.25, 0.2, 0.15, 0.12)
TIMES = (0.9, 0.7, 0.5, 0.3)
QUICK_NETS, QUICK_BYTES, QUICK_TIMES, QUICK_SIZE, QUICK_SECONDS = ("cnn_cifar10",), (0.12,), (0.5,), 400, 0.5
SECONDS = 3.0
"""Seconds of the interleaved run for each of its models."""

Budget = Literal["bytes", "time"]
Precision = Literal["auto", "float32"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model on the test samples, and beside the dense one.

    Attributes:
        name: name for users.
        bytes: bytes of its files.
        values: each test sample's cosine, float `(N,)`, or whether its answer is right, bool `(N,)`.
        neighbours: share of common nearest neighbours; None for class scores.
        speedup: time of the dense model over its own.
        speedup_interval: 99 % interval of `speedup`.
    """

    name: str
    bytes: int
    values: Array
    neighbours: float | None = None
    speedup: float = 1.0
    speedup_interval: Interval = (1.0, 1.0)

    @property
    def value(self) -> float:
        """Top-1 in percent, or the mean cosine."""
        return float(self.values.mean()) * (100 if self.values.dtype == bool else 1)

    @property
    def value_interval(self) -> Interval:
        """95 % interval of `value`."""
        if self.values.dtype == bool:
            return wilson_interval(int(self.values.sum()), len(self.values))
        return mean_interval(self.values)

    def facts(self) -> dict[str, Any]:
        """Return what is stored of it."""
        kept = ("name", "bytes", "speedup", "speedup_interval", "value", "value_interval", "neighbours")
        return {name: getattr(self, name) for name in kept}

    def dominates(self, other: "Model") -> bool:
        """Return whether it is no larger than another model, not measurably slower, and better by its answers."""
        is_slower = self.speedup_interval[1] < other.speedup_interval[0]
        return self.bytes <= other.bytes and not is_slower and gain_interval(other.values, self.values)[0] > 0

    def keeps(self, budget: Budget, keep: float, dense_bytes: int) -> bool:
        """Return whether it keeps a budget; of time, with its whole interval."""
        if budget == "bytes":
            return self.bytes <= keep * dense_bytes
        return keep * self.speedup_interval[0] >= 1


def gain_interval(old: Array, new: Array) -> Interval:
    """Return the 95 % interval of the mean of `new - old`, both `(N,)` of the same samples; of shares in points."""
    if old.dtype == bool:
        return difference_interval(int((old & ~new).sum()), int((new & ~old).sum()), len(old))
    return mean_interval(new - old)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net at one budget.

    Attributes:
        net: one of `NETS`.
        precision: value of `--precision`.
        budget: what is limited.
        keep: share of the dense model's bytes or time.
        dense_bytes: bytes of the dense file.
        dense_value: top-1 of the dense model in percent, or 1 for the cosine.
        name: name of the delivered model; "" if the budget is refused, as for the following fields.
        bytes: bytes of the delivered model.
        speedup: time of the dense model over its own.
        speedup_interval: 99 % interval of `speedup`.
        value: top-1 in percent, or mean cosine, on the test samples.
        value_interval: 95 % interval of `value`.
        neighbours: share of common nearest neighbours; None for class scores.
        dominated_by: name of a rival that dominates; "" if none does.
        refused: message of the export; "" if there is a model.
        tested: number of test samples.
        seconds: wall-clock seconds of the export.
    """

    net: str
    precision: Precision
    budget: Budget
    keep: float
    dense_bytes: int
    dense_value: float
    name: str = ""
    bytes: int | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    value: float | None = None
    value_interval: Interval | None = None
    neighbours: float | None = None
    dominated_by: str = ""
    refused: str = ""
    tested: int = 0
    seconds: float = 0.0


def compared(row: Row, delivered: Model | None, rivals: Sequence[Model]) -> Row:
    """Return the row with the delivered model, None if the budget is refused, and the first rival that dominates it."""
    if delivered is None:
        found = [rival for rival in rivals if rival.keeps(row.budget, row.keep, row.dense_bytes)]
        return replace(row, dominated_by=found[0].name if found else "")
    found = [rival for rival in rivals if rival.dominates(delivered)]
    return replace(row, **delivered.facts(), dominated_by=found[0].name if found else "")


Cell = tuple[Precision, Budget, float]


@dataclass(kw_only=True)
class Net:
    """A net with its rivals.

    Attributes:
        case: the dense model and its data.
        calib: input name -> calibration samples.
        seconds: seconds of the interleaved run for each of its models.
        bench_seconds: seconds of the measurement in each export.
        failed: name of a rival -> onnxruntime's error.
        provider: execution provider of the measurements and of the exports.
    """

    case: Case
    calib: Inputs
    seconds: float
    bench_seconds: float
    failed: dict[str, str]
    provider: str = "cpu"

    def measured(self, cells: Sequence[Cell]) -> tuple[list[Row], list[Model]]:
        """Export at every budget, judge all models, and return the rows and the rivals."""
        case = self.case
        dense = self._judged("dense", case.path)
        found = [(rival.path, rival.name) for rival in self._rivals() if rival.path is not None]
        rivals = [(path, self._judged(name, path)) for path, name in found]
        exports = [self._exported(cell, number, dense) for number, cell in enumerate(cells)]
        paths = [path for path, _ in rivals] + [path for path, _ in exports if path is not None]
        times = self._times(paths)
        known = [replace(model, **times[path]) for path, model in rivals]
        rows = []
        for path, row in exports:
            ours = None if path is None else replace(self._judged(row.name, path), **times[path])
            rows.append(compared(row, ours, known))
            common.progress(_said(rows[-1]))
        return rows, known

    def _rivals(self) -> Iterator[Rival]:
        operators = {node.op_type for node in onnx.load(str(self.case.path), load_external_data=False).graph.node}
        folder = self.case.path.parent
        schemes = rival_schemes(operators, short_name_of_user(self.provider))
        batches = partial(cases.batches, self.calib, cases.BATCH)
        for rival in make_rivals(self.case.path, folder, schemes, batches, self.provider):
            if rival.error:
                self.failed[rival.name] = rival.error
            yield rival

    def _exported(self, cell: Cell, number: int, dense: Model) -> tuple[Path | None, Row]:
        """Export at a budget; return the delivered model, None if the budget is refused, and the row so far."""
        precision, budget, keep = cell
        case, started = self.case, time.perf_counter()
        limit = {"max_size": int(keep * dense.bytes)} if budget == "bytes" else {"keep_latency": keep}
        config = ExportConfig.of(
            None,
            calib=self.calib,
            precision=precision,
            bench_seconds=self.bench_seconds,
            provider=self.provider,
            **limit,
        )
        row = Row(
            net=case.name,
            precision=precision,
            budget=budget,
            keep=keep,
            dense_bytes=dense.bytes,
            dense_value=dense.value,
            tested=len(dense.values),
        )
        bundle = case.path.parent / f"bundle {number}"
        kept = SweepCache.of(case.path.parent / f"kept {precision}", "rivals")
        try:
            report = export_run(str(case.path), config, kept=kept).write_bundle(bundle, force=False)
        except UsageError:
            raise  # a fault of this script
        except RsiDeployError as error:
            row = replace(row, refused=str(error), seconds=time.perf_counter() - started)
            common.progress(f"{case.name} at {keep:g} of {budget}, {precision}: refused ({row.seconds:.0f} s)")
            return None, row
        name = "low rank, float32" if report.precision is None else report.precision.delivered.name
        row = replace(row, name=name, seconds=time.perf_counter() - started)
        common.progress(f"{case.name} at {keep:g} of {budget}, {precision}: {name} ({row.seconds:.0f} s)")
        return bundle / "model.onnx", row

    def _judged(self, name: str, path: Path) -> Model:
        """Return a model with its answers on the test samples."""
        outputs, reference = cases.outputs_of(path, self.case.test), self.case.reference
        if reference.ndim == 1:
            return Model(name=name, bytes=file_bytes(path), values=outputs.argmax(axis=1) == reference)
        return Model(
            name=name,
            bytes=file_bytes(path),
            values=(outputs.astype(np.float64) * reference).sum(axis=1),
            neighbours=cases.neighbour_overlap(outputs, reference),
        )

    def _times(self, paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
        """Return the speed-up of every model and its interval, of one interleaved run; equal files are timed once."""
        digests = {path: variant_file(path, "").sha256 for path in paths}
        files = {digest: path for path, digest in digests.items()}
        first = {name: array[:1] for name, array in self.calib.items()}
        names = ["dense", *files]
        models = [self.case.path, *files.values()]
        seconds = self.seconds * len(models)
        result = latency.bench(models, labels=names, feeds=first, seconds=seconds, provider=self.provider)
        found = {
            arm.label: {"speedup": arm.speedup, "speedup_interval": arm.speedup_interval} for arm in result.arms[1:]
        }
        return {path: found[digest] for path, digest in digests.items()}


def _said(row: Row) -> str:
    begin = f"{row.net} at {row.keep:g} of {row.budget}, {row.precision}: "
    end = f"; dominated by {row.dominated_by}" if row.dominated_by else ""
    if row.value is None:
        return f"{begin}refused{end}: {row.refused}"
    return f"{begin}{row.name}, {row.bytes:,} bytes, {row.speedup:.2f}x, {row.value:.4g}{end}"


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return the goal on the cells of `auto`; those of low rank alone are counted beside them."""
    cells, plain = ([row for row in rows if row.precision == name] for name in ("auto", "float32"))
    bad = [row for row in cells if row.dominated_by]
    said = f"{len(bad)} of {len(cells)} cells are dominated, goal 0"
    if bad:
        said += "; " + ", ".join(f"{row.net} at {row.keep:g} of {row.budget} by {row.dominated_by}" for row in bad)
    if plain:
        said += f"; low rank alone: {sum(bool(row.dominated_by) for row in plain)} of {len(plain)}"
    return [Goal(name="no rival dominates what auto delivers", held=bool(cells) and not bad, row=said)]


COLUMNS = ("net", "budget", "precision", "delivered", "bytes", "speed-up", "answers", "dense", "dominated by")


def _cells(row: Row) -> list[str]:
    begin = [row.net, f"{row.keep:g} of {row.budget}", row.precision]
    if row.value is None or row.bytes is None:
        return [*begin, "refused", "", "", "", _shown(row.dense_value), row.dominated_by or "-"]
    return [*begin, *_facts(row), _shown(row.dense_value), row.dominated_by or "-"]


def _facts(found: Any) -> list[str]:
    """Return the cells of a delivered model or of a rival."""
    low, high = found.speedup_interval
    value = _shown(found.value) + ("" if found.neighbours is None else f", neighbours {found.neighbours:.3f}")
    return [found.name, f"{found.bytes:,}", f"{found.speedup:.2f} ({low:.2f} to {high:.2f})", value]


def _shown(value: float) -> str:
    return f"{value:.2f} %" if value > 1.5 else f"{value:.4f}"


def markdown(rows: Sequence[Row], rivals: Mapping[str, Sequence[Model]]) -> str:
    """Return the rows, and the rivals of each net, as two Markdown tables."""
    made = [[net, *_facts(rival)] for net, models in rivals.items() for rival in models]
    table = common.markdown_table(COLUMNS, [_cells(row) for row in rows])
    return table + "\n" + common.markdown_table(("net", "rival", "bytes", "speed-up", "answers"), made)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.rivals")
    options.add_argument("--nets", nargs="+", choices=NETS, help="only these (default: all)")
    options.add_argument("--budgets", nargs="+", choices=("bytes", "time"), default=("bytes", "time"))
    options.add_argument("--shares", nargs="+", type=float, help="only these shares of the budgets (default: all)")
    options.add_argument("--provider", default="cpu", help="of onnxruntime, with options [default: cpu]")
    options.add_argument("--float32", action="store_true", help="also export low rank alone")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    shares: dict[Budget, Sequence[float]] = {
        "bytes": args.shares or (QUICK_BYTES if args.quick else BYTES),
        "time": args.shares or (QUICK_TIMES if args.quick else TIMES),
    }
    precisions: tuple[Precision, ...] = ("auto", "float32") if args.float32 else ("auto",)
    cells: list[Cell] = [(p, budget, keep) for p in precisions for budget in args.budgets for keep in shares[budget]]
    settings: dict[str, Any] = {"quick": args.quick, "budgets": list(args.budgets), "failed_rivals": {}}
    settings["provider"] = args.provider
    rivals: dict[str, list[Model]] = {}

    def measure(name: str) -> list[Row]:
        failed = settings["failed_rivals"].setdefault(name, {})
        rows, rivals[name] = _measured(name, cells, failed, args.provider, quick=args.quick)
        return rows

    names = args.nets or (QUICK_NETS if args.quick else NETS)
    rows = common.measured_nets(names, settings, measure)
    stored = {net: [rival.facts() for rival in models] for net, models in rivals.items()}
    table = markdown(rows, rivals)
    return common.finish(
        "bench.rivals",
        arguments,
        args,
        settings,
        table,
        judged(rows),
        rows=[asdict(row) for row in rows],
        rivals=stored,
    )


def _measured(
    name: str, cells: Sequence[Cell], failed: dict[str, str], provider: str, *, quick: bool
) -> tuple[list[Row], list[Model]]:
    """Return the rows and the rivals of one net."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        case = cases.load(name, Path(folder))
        case = of_the_same_kind(case) if name in CIFAR else case
        size = min(case.size, QUICK_SIZE) if quick else case.size
        rows = np.arange(size) * case.available // size
        net = Net(
            case=case,
            calib={key: array[rows] for key, array in case.pool.items()},
            seconds=QUICK_SECONDS if quick else SECONDS,
            bench_seconds=2.0 if quick else 10.0,
            failed=failed,
            provider=provider,
        )
        return net.measured(cells)


if __name__ == "__main__":
    common.run(main)
