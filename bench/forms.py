"""What do the pivoted form and hidden units gain over plain splits?

    accuracy    nets under a budget, calibrated and planned as in an export, with plain splits, with each form, with all
    digits      the digit ViT, exported under a budget
    time        a square product, rectified and followed by one of 8 outputs, in onnxruntime on the CPU
    units       ViT-B/32 with random weights and the same MACs, by fewer hidden units and by plain splits
    language    SmolLM2-135M, every linear layer of its blocks cut to the same share of its numbers

A pivoted split holds a product of rank r in r (m + n - r) numbers, a plain one in r (m + n).

The variants of `time` have the same outputs. `plain` is a split at half of the rank, with as many numbers as the dense
product; the others are pivoted at the same rank, with three quarters of them. In `one run` the pivots are the first
outputs; in `scattered` they are not, and a Gather puts the outputs in order; in `folded` the next product takes its
place. In `language` the factors are those of the whitened weight (SVD-LLM): W S = U s V^T, left = U, right = U^T W,
with S S^T the second moments of the input in the dense model. No ranks are planned.

Goals (`--check` exits 4 when one is missed):
  1. at half of its linear parameters, MiniLM is at most two thirds as far from the dense model as with plain splits;
  2. cnn_cifar10 at 0.3 of its parameters loses at most 0.5 points, at 0.6 of its MACs 1.0, ResNet-20 at 0.4 of its
     MACs 2.0, EfficientNet-Lite0 at 0.8 of its MACs half of what plain splits lose; the digit ViT at 0.6 1.0;
  3. pivots in one run, and folded ones, take at most 0.8 of the dense time, at widths 1024 and 4096, 1 and 128 rows;
  4. ViT-B/32 with 0.6 of its MACs, one image, is at least 1.1 times as fast by units as by plain splits;
  5. the language model's perplexity is at least a third lower than that of plain splits, with 0.2 and 0.4 removed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import graph_passes as gp
from bench import accuracy, cases, common, language_model, untrained
from bench.arms import PRODUCT, Unit
from bench.common import Goal
from bench.language_model import LanguageModel
from graph_passes.forms import Form, largest_rank, split_numbers
from rsi_deploy import export
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.calibration.moments import Moments
from rsi_deploy.calibration.reduced_rank_regression import leading_left_vectors, regularized_cholesky, ridge_level
from rsi_deploy.calibration.rounding import second_moments
from rsi_deploy.core.sites import site_name
from rsi_deploy.costing.zero_filled import write_zero_filled
from rsi_deploy.exporting.timing.profile import fed_with
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.site_options import FORMS, PLAIN_FORMS
from rsi_deploy.runtime.shape_trace import trace_run
from samples import digits

Array = npt.NDArray[Any]
SAMPLES = Path(digits.__file__).parent

PARTS = ("accuracy", "digits", "time", "units", "language")
CASES: Mapping[str, tuple[str, float, Unit, float | None]] = {
    "minilm": ("minilm", 0.5, "linear parameters", 2 / 3),
    "cnn_cifar10": ("cnn_cifar10", 0.3, "parameters", None),
    "cnn_cifar10-macs": ("cnn_cifar10", 0.6, "MACs", None),
    "resnet20": ("resnet20", 0.4, "MACs", None),
    "lite0": ("lite0", 0.8, "MACs", 0.5),
}
"""Name of a case -> net, budget, its unit, and the share of the loss of plain splits that may be lost."""
MOST_LOST = {"cnn_cifar10": 0.5, "cnn_cifar10-macs": 1.0, "resnet20": 2.0, "digits_vit": 1.0}
VARIANTS: Mapping[str, tuple[Form, ...]] = {
    "plain": PLAIN_FORMS,
    "pivoted": (*PLAIN_FORMS, "pivoted"),
    "units": (*PLAIN_FORMS, "units"),
    "all": FORMS,
}
DIGITS_KEEP = 0.6
UNITS_NET, UNITS_KEEP, LEAST_FASTER = "vit_b_32", 0.6, 1.1
WIDTHS, ROWS, OUTPUTS = (1024, 4096), (1, 128), 8
MOST_TIME, SECONDS = 0.8, 20.0
REMOVED, WINDOWS, TEST_WINDOWS = (0.2, 0.4), 24, 8
LEAST_GAIN = 1 / 3
RIDGE = 1e-6
"""In mean second moments of the inputs: enough for a Cholesky factor."""
QUICK_UNITS_NET = "minilm"
QUICK_NETS, QUICK_WIDTHS, QUICK_SECONDS, QUICK_WINDOWS, QUICK_REMOVED = ("cnn_cifar10",), (256,), 1.0, (2, 1), (0.2,)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured variant.

    Attributes:
        part: one of `PARTS`.
        case: net and budget, or sizes, or share removed.
        variant: name of the variant within its case.
        kept: numbers (or MACs) over those of the dense model, product or layers.
        value: points lost, or time over that of dense, or perplexity.
        interval: 99 % interval of a time; None for the others.
        ms: median milliseconds of a call.
    """

    part: str
    case: str
    variant: str
    kept: float
    value: float
    interval: tuple[float, float] | None = None
    ms: float | None = None


# --- accuracy -------------------------------------------------------------------------------------------------------


def measured_accuracy(name: str, variants: Sequence[str], draws: int, *, quick: bool) -> list[Row]:
    """Return the points that a case loses in each variant, means over draws.

    Raises:
        UnavailableError: the net is not on this machine.
    """
    (net, keep, unit, _), rows = CASES[name], list[Row]()
    sizes = {"size": accuracy.QUICK_SIZE, "limit": accuracy.QUICK_TEST} if quick else {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        case = cases.load(net, Path(folder), **sizes)
        dense = case.score(case.path).value
        for variant in variants:
            runs = list(accuracy.measure(case, unit, [keep], draws, arms=[PRODUCT], forms=VARIANTS[variant]))
            (row,) = accuracy.tabulate(runs, unit, dense)
            found = Row(part="accuracy", case=name, variant=variant, kept=row.kept, value=row.lost)
            common.progress(f"{name}, {variant}: {found.value:.2f} points lost")
            rows.append(found)
    return rows


def measured_digits() -> list[Row]:
    """Return the points that the digit ViT loses in an export, on images that the export does not see."""
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        report = export(
            "samples.digits:vit",
            Path(folder) / "bundle",
            checkpoint=SAMPLES / "digits_vit.safetensors",
            calib=SAMPLES / "digits_calib.npz",
            data=SAMPLES / "digits_eval.npz",
            keep_macs=DIGITS_KEEP,
            precision="float32",
            allow_slower=True,
            measure=False,
        )
    assert report.accuracy is not None
    lost = (report.accuracy.dense.top1 or 0.0) - (report.accuracy.compressed.top1 or 0.0)
    kept = report.compressed.macs / report.dense.macs
    return [Row(part="digits", case="digits_vit", variant="all", kept=kept, value=lost)]


# --- time -----------------------------------------------------------------------------------------------------------


def product_models(width: int, folder: Path) -> dict[str, Path]:
    """Write the variants of a product `width` wide; all have the same outputs, up to rounding."""
    rng, rank = np.random.default_rng(0), width // 2
    pivots = np.arange(rank)
    left = np.concatenate([np.eye(rank), rng.standard_normal((width - rank, rank)) / rank**0.5]).astype(np.float32)
    right = (rng.standard_normal((rank, width)) / width**0.5).astype(np.float32)
    tail = rng.standard_normal((width, OUTPUTS)).astype(np.float32)
    order = rng.permutation(width)  # output i of the scattered product is output order[i] of the other
    places = np.argsort(order)[:rank]
    scattered = _pivoted(left[order], right, places)
    variants: dict[str, tuple[Array, Array, gp.SplitFactors | gp.Dense]] = {
        "dense": (left, tail, gp.Dense(reason="dense")),
        "plain": (left, tail, gp.SplitFactors(left=left[None], right=right[None])),
        "one run": (left, tail, _pivoted(left, right, pivots)),
        "scattered": (left[order], tail[order], scattered),
        "folded": (left[order], tail[order], scattered),
    }
    paths = {}
    for name, (own, last, factors) in variants.items():
        model = _chain(np.ascontiguousarray((own @ right).T), last)
        splitter = gp.split_by_site(model)
        for site in splitter:
            splitter.answer(factors if site.out_features == width else gp.Dense(reason="the same in all variants"))
        if name == "folded" and not gp.FoldPermutationsPass()(model).folded:
            raise AssertionError("the order of the outputs is not folded")
        paths[name] = folder / f"{name.replace(' ', '_')}.onnx"
        write_external(model, paths[name])
    return paths


def _pivoted(left: Array, right: Array, pivots: Array) -> gp.SplitFactors:
    return gp.SplitFactors(left=left[None], right=right[None], form="pivoted", pivots=pivots[None])


def _chain(weight: Array, tail: Array) -> ir.Model:
    """Return `y = relu(x weight) tail`."""
    width, outputs = tail.shape
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="tail"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", n]) for name, n in (("x", width), ("y", outputs))
    ]
    weights = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(tail, "v")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def measured_times(width: int, seconds: float, threads: int | None) -> list[Row]:
    """Return the time of each variant over the dense one, measured in turns."""
    rows = []
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        paths = product_models(width, Path(folder))
        for batch in ROWS:
            result = bench(list(paths.values()), batch=batch, threads=threads, seconds=seconds, labels=list(paths))
            for arm in result.arms:
                kept = {"dense": 1.0, "plain": 1.0}.get(arm.label, 0.75)
                rows.append(_timed_row("time", f"{width} wide, {batch} row{'s' * (batch > 1)}", arm, kept))
    return rows


def _timed_row(part: str, case: str, arm: VariantResult, kept: float) -> Row:
    ends = arm.speedup_interval
    row = Row(
        part=part,
        case=case,
        variant=arm.label,
        kept=kept,
        value=1 / (arm.speedup or 1.0),
        interval=None if ends is None else (1 / ends[1], 1 / ends[0]),
        ms=arm.median_ms,
    )
    common.progress(f"{case}: {arm.label} {row.value:.3f} of dense")
    return row


# --- units ----------------------------------------------------------------------------------------------------------


def unit_plans(model: ir.Model, keep: float) -> dict[str, dict[str, tuple[str, int]]]:
    """Return the splits of the variants: hidden units of all MLPs, and plain splits of all large products.

    Args:
        model: the dense model.
        keep: share of the MACs of the products that each keeps, about.
    """
    sites = [site for site in gp.find_sites(model) if isinstance(site, gp.Site) and site.groups == 1]
    sizes = {site.weight: site.out_features * site.in_features for site in sites}
    pairs = {
        site: sizes[site.weight] + sum(sizes[maker] for maker in site.units.makers) for site in sites if site.units
    }
    share = 1 - (1 - keep) * sum(sizes.values()) / sum(pairs.values())
    units: dict[str, tuple[str, int]] = {}
    for site in pairs:
        assert site.units is not None
        units[site_name(site.weight)] = "units", site.units.run * max(1, int(share * site.units.count) // 8 * 8)
    plain = {}
    for site in sites:
        rank = int(keep * sizes[site.weight] / (site.out_features + site.in_features)) // 8 * 8
        if rank:
            plain[site_name(site.weight)] = site.forms[0], rank
    return {"units": units, "plain": plain}


def measured_units(net: str, seconds: float, threads: int | None) -> list[Row]:
    """Return the time of both variants over the dense one, measured in turns.

    Raises:
        UnavailableError: the net is not on this machine.
    """
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        dense = untrained.written(net, Path(folder))
        paths = {"dense": dense}
        for name, splits in unit_plans(load_model(dense), UNITS_KEEP).items():
            paths[name] = Path(folder) / f"{name}.onnx"
            write_zero_filled(dense, paths[name], splits)
        macs = {
            name: sum(trace_run(path, fed_with(path, 1, 0, None, None)).macs.values()) for name, path in paths.items()
        }
        result = bench(list(paths.values()), batch=1, threads=threads, seconds=seconds, labels=list(paths))
    rows = []
    for arm in result.arms:
        kept = macs[arm.label] / macs["dense"]
        rows.append(_timed_row("units", f"{net}, 1 image", arm, kept))
    return rows


# --- language -------------------------------------------------------------------------------------------------------


def rank_for(form: str, rows: int, columns: int, keep: float) -> int:
    """Return the largest rank, at least 1, whose factors hold at most the share `keep` of a matrix's numbers.

    Examples:
        >>> rank_for("gemm", 576, 576, 0.8), rank_for("pivoted", 576, 576, 0.8)
        (230, 318)
    """
    most = keep * rows * columns
    ranks = range(1, largest_rank(form, rows, columns) + 1)
    return max((rank for rank in ranks if split_numbers(form, rows, columns, rank) <= most), default=1)


def measured_language(model: LanguageModel, removed: Sequence[float], calibration: int, test: int) -> list[Row]:
    """Return the perplexity of the dense model and of uniform splits in both forms; changes the model's weights.

    Args:
        model: the language model.
        removed: shares of the numbers of every layer.
        calibration: number of windows of text to compute moments from.
        test: number of windows of text to be judged by.
    """

    def row(case: str, variant: str, kept: float) -> Row:
        value = language_model.perplexity(model.module, model.test[:test])
        common.progress(f"language, {case}, {variant}: perplexity {value:.2f} with {kept:.4f} kept")
        return Row(part="language", case=case, variant=variant, kept=kept, value=value)

    rows = [row("dense", "dense", 1.0)]
    layers = model.linears()
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    moments = language_model.input_moments(model.module, model.calibration[:calibration], list(layers))
    bases = {name: whitened_basis(weights[name], moments[name]) for name in layers}
    common.progress("language: factors are computed")
    total = sum(weight.numel() for weight in weights.values())
    for share in removed:
        for variant, form in (("plain", "gemm"), ("pivoted", "pivoted")):
            kept = 0
            for name, layer in layers.items():
                outputs, inputs = weights[name].shape
                rank = rank_for(form, outputs, inputs, 1 - share)
                left = bases[name][:, :rank]
                layer.weight.copy_(left @ (left.mT @ weights[name]))
                kept += split_numbers(form, outputs, inputs, rank)
            rows.append(row(f"{share:g} removed", variant, kept / total))
    return rows


def whitened_basis(weight: Tensor, moments: Moments) -> Tensor:
    """Return the left singular vectors of `W S`, `(out, full rank)`, the leading one first; `S S^T = E x x^T`."""
    second = second_moments(moments)
    root, _ = regularized_cholesky(second, ridge_level(second.diagonal(dim1=-2, dim2=-1), RIDGE))
    whitened = weight[None].to(root.dtype) @ root
    return leading_left_vectors(whitened, min(weight.shape), Solver(method="svd"))[0].to(weight.dtype)


# --- results --------------------------------------------------------------------------------------------------------


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals whose rows were measured. A model above its budget misses all of them."""
    goals = []
    for part, case in dict.fromkeys((row.part, row.case) for row in rows):
        own = {row.variant: row for row in rows if (row.part, row.case) == (part, case)}
        if part == "accuracy" and own.keys() >= {"all", "plain"}:
            ours, plain, (_, keep, _, share) = own["all"], own["plain"], CASES[case]
            text = f"{ours.value:.2f} points, {plain.value:.2f} with plain splits, with {ours.kept:.4f} kept"
            limit = MOST_LOST[case] if share is None else share * plain.value
            held = ours.kept <= keep and ours.value <= limit
            goals.append(Goal(name=f"{case} at {keep:g} loses at most {limit:.2f}", held=held, row=text))
        elif part == "digits":
            ours, limit = own["all"], MOST_LOST[case]
            held = ours.kept <= DIGITS_KEEP and ours.value <= limit
            text = f"{ours.value:.2f} points, with {ours.kept:.4f} kept"
            goals.append(Goal(name=f"{case} at {DIGITS_KEEP:g} loses at most {limit:g}", held=held, row=text))
        elif part == "units":
            faster = own["plain"].value / own["units"].value
            text = f"{faster:.2f} times as fast, with {own['units'].kept:.3f} and {own['plain'].kept:.3f} of the MACs"
            held = faster >= LEAST_FASTER and own["units"].kept <= max(UNITS_KEEP, own["plain"].kept) + 0.005
            goals.append(
                Goal(name=f"units {LEAST_FASTER:g} times as fast as plain splits, {case}", held=held, row=text)
            )
        elif part == "time":
            without_gather = [own["one run"], own["folded"]]
            text = ", ".join(f"{row.variant} {row.value:.3f} of dense" for row in without_gather)
            held = all(row.value <= MOST_TIME for row in without_gather)
            goals.append(Goal(name=f"at most {MOST_TIME:g} of dense, {case}", held=held, row=text))
        elif part == "language" and case != "dense":
            ours, plain = own["pivoted"], own["plain"]
            text = f"perplexity {ours.value:.2f}, plain {plain.value:.2f}: {1 - ours.value / plain.value:.0%} lower"
            held = ours.kept <= plain.kept + 1e-3 and ours.value <= (1 - LEAST_GAIN) * plain.value
            goals.append(Goal(name=f"a third lower, {case}", held=held, row=text))
    return goals


COLUMNS = ("part", "case", "variant", "kept", "points lost, share of time, or perplexity", "ms")


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = []
    for row in rows:
        ends = "" if row.interval is None else f" ({row.interval[0]:.3f} to {row.interval[1]:.3f})"
        value = f"{row.value:.3f}{ends}" if row.part in ("time", "units") else f"{row.value:.2f}"
        ms = "" if row.ms is None else f"{row.ms:.3g}"
        cells.append([row.part, row.case, row.variant, f"{row.kept:.3f}", value, ms])
    return common.markdown_table(COLUMNS, cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.forms")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these (default: all)")
    options.add_argument("--nets", nargs="+", choices=CASES, help="only these, for accuracy (default: all)")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="for accuracy")
    options.add_argument("--draws", type=int, default=1, metavar="N", help="of calibration data [default: 1]")
    options.add_argument("--threads", type=int, metavar="N", help="of onnxruntime, for time (default: one a core)")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    started = time.perf_counter()
    measures = _measures(args)
    settings: dict[str, Any] = {"quick": args.quick, "draws": args.draws, "threads": args.threads}
    rows = common.measured_nets(measures, settings, lambda name: measures[name]())
    settings["wall_seconds"] = time.perf_counter() - started
    stored = [asdict(row) for row in rows]
    return common.finish("bench.forms", arguments, args, settings, markdown(rows), judged(rows), rows=stored)


def _measures(args: argparse.Namespace) -> dict[str, Callable[[], list[Row]]]:
    """Return the measurements that the options name, by name."""
    quick: bool = args.quick
    found: dict[str, Callable[[], list[Row]]] = {}
    if "accuracy" in args.parts:
        for net in args.nets or (QUICK_NETS if quick else CASES):
            found[net] = partial(measured_accuracy, net, args.variants, args.draws, quick=quick)
    if "digits" in args.parts:
        found["digits_vit"] = measured_digits
    if "time" in args.parts:
        for width in QUICK_WIDTHS if quick else WIDTHS:
            found[f"{width} wide"] = partial(measured_times, width, QUICK_SECONDS if quick else SECONDS, args.threads)
    if "units" in args.parts:
        net, seconds = (QUICK_UNITS_NET, QUICK_SECONDS) if quick else (UNITS_NET, SECONDS)
        found[net] = partial(measured_units, net, seconds, args.threads)
    if "language" in args.parts:
        removed, counts = (QUICK_REMOVED, QUICK_WINDOWS) if quick else (REMOVED, (WINDOWS, TEST_WINDOWS))
        found["smollm2"] = lambda: measured_language(language_model.smollm2(), removed, *counts)
    return found


if __name__ == "__main__":
    common.run(main)
