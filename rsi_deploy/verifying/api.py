"""`verify`: compute again what a bundle's report claims, and state for each claim whether it holds.

    manifest     size and sha256 of every file of the folder; nothing missing, nothing added
    files        the sha256 of every model file, as the report says
    graph        the checker, the opset, the sites, their forms and ranks, parameters (of a float model) and bytes
    MACs         counted on a run on the seeded probe inputs
    budget       whether the reported size, time or drop of top-1 keeps the budget
    outputs      the compressed model on the seeded probe inputs
    parity       where dense.onnx was kept: approximation error against it
    calibration  where it was kept, with --calib: quality of the outputs on both parts of the calibration data
    accuracy     with --data: top-1 of the compressed model
    page         whether report.html was made from this report.json

A folder that `package` wrote has no report of its own: only its manifest is verified.
Claims that cannot be computed again here (latency is the machine's; the dense model may be gone) are listed as such.
"""

import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from graph_passes import count_parameters
from graph_passes.split_markers import FoundSplit, found_splits
from rsi_deploy.calibration.calibration_data import CHECK_OPTION, CalibrationData, check_source
from rsi_deploy.calibration.output_agreement import calibration_record
from rsi_deploy.calibration.record import CalibrationRecord, OutputQuality
from rsi_deploy.core.errors import ModelError, RsiDeployError, UsageError
from rsi_deploy.core.progress import at_samples, step
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.dataset import for_inputs
from rsi_deploy.data.sources import Dataset, open_undecided
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.io.bundle import is_sweep
from rsi_deploy.io.manifest import MANIFEST, check_manifest, file_hash
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.quality import parse_quality
from rsi_deploy.report.pages.html import source_of
from rsi_deploy.report.schema import ProbeOutput, Report, read_report
from rsi_deploy.report.verification import Claim, VerifyResult
from rsi_deploy.runtime.batch_independence import count_samples
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.probe import feeds_fingerprint, probe_feeds
from rsi_deploy.runtime.feeds.user_feeds import read_feeds
from rsi_deploy.runtime.feeds.values import arrays_of_outputs
from rsi_deploy.runtime.parity import compare_outputs
from rsi_deploy.runtime.probe_runs import probe_names, run_probe
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.runtime.shape_trace import trace_run

QUALITY = (
    *("output_error", "divergence", "agreement", "cosine", "worst_cosine", "neighbours"),
    *("perplexity", "perplexity_ratio"),
)
"""Fields of `OutputQuality` that are computed again."""
UNKNOWN_OPERATOR = "onnx.checker: No Op registered for"
"""Beginning of a message of the checker about an operator that onnxruntime knows and ONNX does not."""
PRODUCTS = {"matmul", "gemm"}
"""Forms that a quantized product does not tell apart: onnxruntime's tools turn a Gemm into MatMul and Add."""


def verify(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    calib: str | Path | None = None,
    calib_check: str | Path | None = None,
    feeds: str | Path | Feeds | None = None,
    provider: str = "cpu",
) -> VerifyResult:
    """Compute again what the report of the bundle in `folder` claims, and hold its files against the manifest.

    Args:
        folder: a bundle, or what `package` made of one.
        data: evaluation data; its content must be the data of the report for the accuracy to be compared.
        calib: calibration data; likewise, for what the report says of the outputs on them.
        calib_check: separate check data, where the report has any.
        feeds: the inputs that the export was given in place of random ones: an `.npz`, or input name -> array.
        provider: onnxruntime provider.

    Raises:
        UsageError: no bundle there, or no such data.
        ModelError: a report of another schema.
    """
    folder = Path(folder)
    _refuse_sweep(folder)
    manifest = _attempt("manifest", lambda: [_manifest(folder)])
    if not (folder / "report.json").is_file() and (folder / MANIFEST).is_file():
        return VerifyResult(bundle=str(folder), claims=tuple(manifest))
    report = read_report(folder)
    check_source(calib)
    check_source(calib_check, CHECK_OPTION)
    provider, dataset = str(parse_provider(provider)), None if data is None else open_undecided(data)
    given = read_feeds(feeds) if isinstance(feeds, str | Path) else feeds
    claims = [*manifest, _files(folder, report)]
    model = folder / "model.onnx"
    if model.is_file():
        claims += _attempt("graph", lambda: _graph(model, report))
        claims += _attempt("MACs", lambda: [_macs(model, report, given)])
        claims += _attempt("budget", lambda: _budget(report))
        claims += _attempt("outputs", lambda: [_outputs(model, report, given, provider)])
        claims += _attempt("parity", lambda: [_parity(folder, report, given, provider)])
        claims += _attempt("calibration", lambda: _calibration(folder, report, calib, calib_check, provider))
        claims += _attempt("accuracy", lambda: [_accuracy(folder, report, dataset, provider)])
    claims.append(_page(folder))
    claims.append(_not_checked("latency", "times belong to their machine: run rsi-deploy bench"))
    return VerifyResult(bundle=str(folder), claims=tuple(claims))


def _refuse_sweep(folder: Path) -> None:
    """Refuse the folder of a sweep, whose points are the bundles."""
    if is_sweep(folder):
        point = next(iter(sorted(path.parent for path in folder.glob("point-*/report.json"))), None)
        hint = "finish it with the command that began it" if point is None else f"type rsi-deploy verify {point}"
        raise UsageError(f"{folder} is a sweep; verify takes one of its points, which are bundles", hint=hint)


def _attempt(name: str, check) -> list[Claim]:  # type: ignore[no-untyped-def]
    """The claims of a check; what it raises about the model is a broken claim, not the end of the others."""
    try:
        with step(name):
            return list(check())
    except RsiDeployError as error:
        return [Claim(name=name, status="broken", detail=str(error))]


def _claim(name: str, holds: bool, detail: str) -> Claim:
    return Claim(name=name, status="holds" if holds else "broken", detail=detail)


def _not_checked(name: str, why: str) -> Claim:
    return Claim(name=name, status="not checked", detail=why)


def _probe(path: Path, report: Report, given: Feeds | None) -> Feeds | str:
    """The probe inputs of the report; in words, why there are none."""
    if report.verification.approximation is None:
        return "onnxruntime could not run the model"
    if not report.probe_given:
        return probe_feeds(path, report.settings.seed, report.probe_shapes)
    if given is None:
        return "its inputs were given by hand: add --feeds with the same"
    if feeds_fingerprint(given) != report.probe_fingerprint:
        return "--feeds are not those of the report"
    return given


def _manifest(folder: Path) -> Claim:
    check = check_manifest(folder)
    return _claim("manifest", check.ok, check.summary) if check.present else _not_checked("manifest", check.summary)


def _files(folder: Path, report: Report) -> Claim:
    missing = [name for name in report.files if not (folder / name).is_file()]
    changed = [n for n, digest in report.files.items() if n not in missing and file_hash(folder / n) != digest]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"changed: {', '.join(changed)}"] * bool(changed)
    return _claim("files", not problems, "; ".join(problems) or f"sha256 of {', '.join(report.files)} as reported")


def _page(folder: Path) -> Claim:
    """Whether the page shows this report; what else it may have been changed to is not looked at."""
    if not (folder / "report.html").is_file():
        return _not_checked("page", "the bundle has no report.html")
    same = source_of(folder / "report.html") == file_hash(folder / "report.json")
    return _claim("page", same, f"report.html was made from {'this' if same else 'another'} report.json")


def _graph(path: Path, report: Report) -> list[Claim]:
    try:
        model = load_model(path)  # first: onnx's checker is native code, and believes much
        onnx.checker.check_model(str(path), full_check=True)
        checked = _claim("graph", True, f"onnx.checker passes, opset {model.opset_imports.get('')}")
    except Exception as error:  # protobuf, checker and shape inference have no common base
        problem = f"onnx.checker: {str(error).strip().splitlines()[0]}"
        if not problem.startswith(UNKNOWN_OPERATOR) or not _loads(path):
            return [_claim("graph", False, problem)]
        checked = _not_checked("graph", f"{problem}: an operator of onnxruntime alone")
    found, claimed = found_splits(model), {node for site in report.split_sites for node in site.nodes}
    shared = _shared_otherwise(found, report)
    counts = f"{len(found)} split nodes in the graph, {len(claimed)} in the report"
    claims = [
        checked,
        _claim(
            "sites",
            found.keys() == claimed and not shared,
            counts + f"; right factors are shared otherwise at {', '.join(shared[:4])}" * bool(shared),
        ),
    ]
    size = file_bytes(path)
    claims.append(_parameters(model, report))
    claims.append(_claim("bytes", size == report.compressed.bytes, f"{size:,}, reported {report.compressed.bytes:,}"))
    claims.append(_ranks(found, report))
    return claims


def _loads(path: Path) -> bool:
    """Return whether onnxruntime loads a model."""
    try:
        make_session(path)
    except ModelError:
        return False
    return True


def _parameters(model: ir.Model, report: Report) -> Claim:
    if report.precision is not None and report.precision.scheme != "float32":
        return _not_checked("parameters", "the report counts those of the float model that was quantized")
    params, reported = count_parameters(model), report.compressed.params
    return _claim("parameters", params == reported, f"{params:,}, reported {reported:,}")


def _shared_otherwise(found: Mapping[str, FoundSplit], report: Report) -> list[str]:
    """Sites whose right factor is not shared by those, and only those, that the report says."""
    users: dict[ir.Node, list[str]] = {}
    for site in report.split_sites:
        for split in filter(None, map(found.get, site.nodes)):
            users.setdefault(split.first, []).append(site.name)
    wrong = []
    for site in report.split_sites:
        names = {tuple(users[split.first]) for split in filter(None, map(found.get, site.nodes))}
        if any(site.joint != (shared if len(shared) > 1 else ()) for shared in names):
            wrong.append(site.name)
    return wrong


def _ranks(found: Mapping[str, FoundSplit], report: Report) -> Claim:
    """Forms and ranks as the graph has them; the form is that of the first node that uses the weight."""
    wrong, unread = [], []
    for site in report.split_sites:
        for node, split in ((node, found[node]) for node in site.nodes if node in found):
            if report.precision is not None and not split.size:
                unread.append(site.name)
                continue
            columns = {site.in_features, *((site.out_features,) if len(site.nodes) > 1 else ())}  # maybe transposed
            ranks = [split.rank(site.groups, size) for size in columns]
            if site.rank not in ranks:
                wrong.append(f"{site.name}: rank {ranks[0]:g}, reported {site.rank}")
            is_product = report.precision is not None and {split.form, site.form} == PRODUCTS
            if node == site.nodes[0] and split.form != site.form and not is_product:
                wrong.append(f"{site.name}: form {split.form}, reported {site.form}")
    if unread and not wrong:
        return _not_checked("ranks", f"the graph does not show the shapes of the factors of {', '.join(unread[:4])}")
    forms = Counter(site.form or "" for site in report.split_sites)
    counts = ", ".join(f"{count} {form}" for form, count in sorted(forms.items()))
    return _claim("ranks", not wrong, "; ".join(wrong[:4]) or f"ranks and forms as reported ({counts})")


def _macs(path: Path, report: Report, given: Feeds | None) -> Claim:
    feeds = _probe(path, report, given)
    if isinstance(feeds, str):
        return _not_checked("MACs", feeds)
    batch = count_samples(path, feeds)
    macs = sum(count // batch for count in trace_run(path, feeds).macs.values())
    return _claim("MACs", macs == report.compressed.macs, f"{macs:,}, reported {report.compressed.macs:,}")


def _budget(report: Report) -> list[Claim]:
    """Return the claim that the reported numbers, each of which has its own check, keep the budget."""
    option, _, value = report.settings.budget.partition(" ")
    if option == "--max-drop" and report.accuracy is not None:
        before, after = report.accuracy.dense.top1, report.accuracy.compressed.top1
        drop = (before or 0) - (after or 0)
        try:
            holds = drop <= float(value.partition(" ")[0])
        except ValueError:
            return [_claim("budget", False, f"{option} {value!r} is no number of points")]
        return [_claim("budget", holds, f"{option} {value}: top-1 drops by {drop:.2f} points")]
    if report.calibration is not None and (report.plan is None or not report.plan.delivers_dense):
        try:
            quality = parse_quality(option, value.partition(" ")[0])
        except ValueError:
            return [_claim("budget", False, f"{option} {value!r} is no number")]
        if quality is not None:
            limit = quality.limit_of(report.calibration.quality)
            shown = "no limit is known" if limit is None else f"{quality.text(limit)} for sure"
            return [_claim("budget", quality.holds(limit), f"{quality}: {shown}, on the check part")]
    if option in ("--keep-latency", "--max-latency"):
        return _time_budget(report, option, value)
    if option not in ("--keep-params", "--keep-macs", "--max-size"):
        return []
    budget = Budget.parse(**{option.removeprefix("--").replace("-", "_"): value})
    allowed, cost = budget.total(getattr(report.dense, budget.cost)), getattr(report.compressed, budget.cost)
    detail = f"{budget}: {cost:,} {budget.cost} of {allowed:,} allowed"
    if cost > allowed and report.timing is not None and (report.timing.undone or not report.split_sites):
        return [_not_checked("budget", f"{detail}: given up, for no such model was faster, as the report says")]
    return [_claim("budget", cost <= allowed, detail)]


def _time_budget(report: Report, option: str, value: str) -> list[Claim]:
    """Whether the reported measurement keeps the time, as far as its interval tells."""
    if report.latency is None or report.latency.arms[1].speedup_interval is None:
        return [_not_checked("budget", f"{option} {value}: nothing was measured")]
    dense, compressed = report.latency.arms
    budget = Budget.parse(**{option.removeprefix("--").replace("-", "_"): value})
    share = budget.total(round(1e6 * dense.median_ms)) / (1e6 * dense.median_ms)
    least = 1 / report.latency.arms[1].speedup_interval[1]
    detail = f"{option} {value}: {compressed.median_ms:.4g} ms of {dense.median_ms:.4g} ms, asked {100 * share:.1f} %"
    return [_claim("budget", least <= share, detail)]


def _calibration(
    folder: Path, report: Report, source: str | Path | None, check: str | Path | None, provider: str
) -> list[Claim]:
    """Return the claims about the outputs on the calibration data."""
    claimed = report.calibration
    if claimed is None:
        return []
    claims = []
    if report.settings.factors == "response":
        claims.append(_not_checked("responses", "only fitting again tells: rsi-deploy export --plan, --calib"))
    if source is None or not (folder / "dense.onnx").is_file():
        missing = (
            "dense.onnx is not in the bundle (export --keep-dense)" if source else "add --calib with the same data"
        )
        return [*claims, _not_checked("calibration", missing)]
    if claimed.is_separate and check is None:
        return [*claims, _not_checked("calibration", "add --calib-check with the same data")]
    source, check = (with_text(data, _text_options(report), folder) for data in (source, check))
    data = CalibrationData(
        source,
        model_inputs(folder / "dense.onnx"),
        report.preprocessing,
        claimed.samples,
        check_size=claimed.check_samples or None,
        check_source=check if claimed.is_separate else None,
        seed=report.settings.seed,
    )
    now, _ = calibration_record(folder / "dense.onnx", folder / "model.onnx", data, provider)
    if _identity(now) != _identity(claimed):
        return [*claims, _not_checked("calibration", "--calib is not the data of the report")]
    parts = {"in-sample": (now.in_sample, claimed.in_sample)}
    if now.checked is not None and claimed.checked is not None:
        parts = {"check part": (now.checked, claimed.checked)} | parts
    compared = {part: _compared(*pair) for part, pair in parts.items()}
    detail = "; ".join(f"{part}: {words}" for part, (_, words) in compared.items())
    return [*claims, _claim("calibration", all(same for same, _ in compared.values()), detail)]


def _text_options(report: Report) -> TextOptions:
    """Return how the export made rows of text, as its recipe has it."""
    try:
        recipe = tomllib.loads(report.recipe)
    except tomllib.TOMLDecodeError:
        return TextOptions()
    return TextOptions(
        column=recipe.get("column"), sequence_length=recipe.get("sequence_length"), tokens=recipe.get("calib_tokens")
    )


def _compared(now: OutputQuality, then: OutputQuality) -> tuple[bool, str]:
    """Return whether two qualities are equal but for rounding, and their values in words."""
    pairs = {name: (getattr(now, name), getattr(then, name)) for name in QUALITY}
    words = [
        f"{name.replace('_', ' ')} {a:.3g}" + ("" if b is None or _near(a, b) else f" (reported {b:.3g})")
        for name, (a, b) in pairs.items()
        if a is not None
    ]
    return all(_near(a, b) for a, b in pairs.values()), ", ".join(words)


def _identity(record: CalibrationRecord) -> tuple[object, ...]:
    """Return what two records of the same samples share."""
    checked = None if record.checked is None else record.checked.data_fingerprint
    return record.samples, record.in_sample.data_fingerprint, record.check_samples, checked


def _near(now: float | None, then: float | None) -> bool:
    """Equal but for the rounding of another machine's kernels, which may change a close top-1 answer."""
    if now is None or then is None:
        return now is then
    return abs(now - then) <= 1e-2 * max(abs(now), abs(then)) + 1e-9


def _outputs(path: Path, report: Report, given: Feeds | None, provider: str) -> Claim:
    feeds = _probe(path, report, given)
    if isinstance(feeds, str):
        return _not_checked("outputs", feeds)
    session = make_session(path, provider)
    arrays = run_probe(session, feeds, path.name)
    names = probe_names(session, arrays)
    now = [ProbeOutput.of(name, array) for name, array in arrays_of_outputs(names, arrays).items()]
    worst = max((_distance(a, b) for a, b in zip(report.probe, now, strict=False)), default=0.0)
    same = [p.name for p in now] == [p.name for p in report.probe] and worst <= 1e-3
    detail = f"probe outputs differ by {worst:.1e} (relative)"
    if not same and report.precision is not None and report.precision.scheme != "float32":
        detail += f"; kernels of {report.precision.scheme} may differ between CPUs: compare on {report.environment.cpu}"
    return _claim("outputs", same, detail)


def _distance(a: ProbeOutput, b: ProbeOutput) -> float:
    if a.shape != b.shape or len(a.first) != len(b.first):
        return float("inf")
    scale = max(abs(a.norm), 1e-12)
    size = max(float(np.prod(a.shape)), 1.0)
    first = max((abs(x - y) for x, y in zip(a.first, b.first, strict=True)), default=0.0)
    return max(abs(a.norm - b.norm) / scale, first / (scale / size**0.5)) if a.norm else abs(b.norm)


def _parity(folder: Path, report: Report, given: Feeds | None, provider: str) -> Claim:
    dense, then = folder / "dense.onnx", report.verification.approximation
    if not dense.is_file() or then is None:
        return _not_checked("parity", "dense.onnx is not in the bundle (export --keep-dense)")
    feeds = _probe(dense, report, given)
    if isinstance(feeds, str):
        return _not_checked("parity", feeds)
    a = run_probe(make_session(dense, provider), feeds, dense.name)
    b = run_probe(make_session(folder / "model.onnx", provider), feeds, "model.onnx")
    now, reported = compare_outputs(a, b, what="parity", remedy="export again").relative_l2, then.relative_l2
    holds = abs(now - reported) <= 1e-3 * max(reported, 1e-3)
    return _claim("parity", holds, f"approximation error {now:.4f}, reported {reported:.4f}")


def _accuracy(folder: Path, report: Report, dataset: Dataset | None, provider: str) -> Claim:
    if report.accuracy is None or dataset is None:
        why = "add --data with the evaluation data" if report.accuracy else "the report claims none"
        return _not_checked("accuracy", why)
    claimed = report.accuracy.compressed
    dataset = for_inputs(dataset, model_inputs(folder / "model.onnx"))
    if dataset.fingerprint() != claimed.data_fingerprint:
        return _not_checked("accuracy", "--data is not the data of the report")
    steps = report.preprocessing if dataset.kind == "images" else None
    result = evaluate(folder / "model.onnx", dataset, preprocessing=steps, provider=provider, progress=at_samples)
    # Another machine's kernels may change a close answer: two samples are allowed for that.
    slack = 200 / max(result.samples, 1)
    holds = abs((result.top1 or 0) - (claimed.top1 or 0)) <= slack
    return _claim("accuracy", holds, f"top-1 {result.top1:.2f} %, reported {claimed.top1:.2f} %")
