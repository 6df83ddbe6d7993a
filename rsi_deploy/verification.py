"""`verify`: compute again what a bundle's report claims, and say for each claim whether it holds.

    files        the sha256 of every model file
    graph        the checker, the opset, the sites' ranks, parameters and bytes
    outputs      the compressed model on the seeded probe inputs
    accuracy     with --data: top-1 of the compressed model (and agreement, where dense.onnx was kept)
    parity       where dense.onnx was kept: approximation error against it

What cannot be computed again here (latency belongs to its machine; the dense model may be gone) is listed as such.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pydantic

from rsi_deploy.accuracy import evaluate
from rsi_deploy.data import Dataset, open_data
from rsi_deploy.errors import RsiDeployError
from rsi_deploy.gates import compare_outputs
from rsi_deploy.onnx_file import file_bytes, file_hash, parameters
from rsi_deploy.probe import Feeds, probe_feeds
from rsi_deploy.providers import make_session, resolve, run_session
from rsi_deploy.report import ProbeOutput, Report, read_report

Status = Literal["holds", "broken", "not checked"]


class Claim(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One claim of the report: what was found when it was computed again."""

    name: str
    status: Status
    detail: str


class VerifyResult(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All claims; `ok` when none is broken."""

    bundle: str
    claims: tuple[Claim, ...]

    @property
    def ok(self) -> bool:
        """Whether no claim is broken."""
        return all(claim.status != "broken" for claim in self.claims)


def verify(folder: str | Path, *, data: str | Path | None = None, provider: str = "cpu") -> VerifyResult:
    """Compute again what the report of the bundle in `folder` claims.

    Args:
        folder: a bundle.
        data: evaluation data; its content must be the data of the report for the accuracy to be compared.
        provider: onnxruntime provider.

    Raises:
        UsageError: no bundle there, or no such data.
        ModelError: a report of another schema.
    """
    folder = Path(folder)
    report = read_report(folder)
    provider, dataset = resolve(provider), None if data is None else open_data(data)
    claims = [_files(folder, report)]
    model = folder / "model.onnx"
    if model.is_file():
        claims += _attempt("graph", lambda: _graph(model, report))
        claims += _attempt("outputs", lambda: [_outputs(model, report, provider)])
        claims += _attempt("parity", lambda: [_parity(folder, report, provider)])
        claims += _attempt("accuracy", lambda: [_accuracy(folder, report, dataset, provider)])
    claims.append(
        Claim(name="latency", status="not checked", detail="times belong to their machine: run rsi-deploy bench")
    )
    return VerifyResult(bundle=str(folder), claims=tuple(claims))


def _attempt(name: str, check) -> list[Claim]:  # type: ignore[no-untyped-def]
    """The claims of a check; what it raises about the model is a broken claim, not the end of the others."""
    try:
        return list(check())
    except RsiDeployError as error:
        return [Claim(name=name, status="broken", detail=str(error))]


def _claim(name: str, holds: bool, detail: str) -> Claim:
    return Claim(name=name, status="holds" if holds else "broken", detail=detail)


def _files(folder: Path, report: Report) -> Claim:
    missing = [name for name in report.files if not (folder / name).is_file()]
    changed = [n for n, digest in report.files.items() if n not in missing and file_hash(folder / n) != digest]
    problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"changed: {', '.join(changed)}"] * bool(changed)
    return _claim("files", not problems, "; ".join(problems) or f"sha256 of {', '.join(report.files)} as reported")


def _graph(path: Path, report: Report) -> list[Claim]:
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = ir.load(path)
    except Exception as error:  # protobuf, checker and shape inference have no common base
        return [_claim("graph", False, f"onnx.checker: {str(error).strip().splitlines()[0]}")]
    # A split node's mark says which factor it holds; the rank is the factor's inner dimension.
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.metadata_props.get("rsi_deploy.split") == "right":
            found[(node.name or "").removesuffix("/right")] = node
    claimed = {node: site for site in report.split_sites for node in site.nodes}
    same = set(found) == set(claimed)
    claims = [
        _claim("graph", True, f"onnx.checker passes, opset {model.opset_imports.get('')}"),
        _claim("sites", same, f"{len(found)} split nodes in the graph, {len(claimed)} in the report"),
    ]
    params, size = parameters(model), file_bytes(path)
    claims.append(
        _claim("parameters", params == report.compressed.params, f"{params:,}, reported {report.compressed.params:,}")
    )
    claims.append(_claim("bytes", size == report.compressed.bytes, f"{size:,}, reported {report.compressed.bytes:,}"))
    claims.append(_ranks(found, report))
    return claims


def _ranks(found: dict[str, ir.Node], report: Report) -> Claim:
    """The right factor holds `groups * rank * in_features` numbers, however it is turned."""
    wrong = []
    for site in report.split_sites:
        for node in filter(None, map(found.get, site.nodes)):
            rank = _constant_size(node) / (site.groups * site.in_features)
            if rank != site.rank:
                wrong.append(f"{site.name}: {rank:g}, reported {site.rank}")
    return _claim("ranks", not wrong, "; ".join(wrong[:4]) or f"as reported at {len(report.split_sites)} sites")


def _constant_size(node: ir.Node) -> int:
    """Numbers in the one constant operand of a split's first node; it may stand behind a Cast."""
    for value in node.inputs:
        if value is not None and (cast := value.producer()) is not None and cast.op_type == "Cast":
            value = cast.inputs[0]
        if value is not None and value.const_value is not None:
            return value.const_value.size
    return 0


def _feeds(path: Path, report: Report) -> Feeds:
    return probe_feeds(path, report.settings.seed, report.probe_shapes)


def _outputs(path: Path, report: Report, provider: str) -> Claim:
    if report.probe_given or report.verification.approximation is None:
        why = "its inputs were given by hand" if report.probe_given else "onnxruntime could not run the model"
        return Claim(name="outputs", status="not checked", detail=why)
    session = make_session(path, provider)
    feeds = _feeds(path, report)
    arrays = run_session(session, feeds, path.name)
    names = [output.name for output in session.get_outputs()]
    now = [ProbeOutput.of(name, array) for name, array in zip(names, arrays, strict=True)]
    worst = max((_distance(a, b) for a, b in zip(report.probe, now, strict=False)), default=0.0)
    same = [p.name for p in now] == [p.name for p in report.probe] and worst <= 1e-3
    return _claim("outputs", same, f"probe outputs differ by {worst:.1e} (relative)")


def _distance(a: ProbeOutput, b: ProbeOutput) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = max(abs(a.norm), 1e-12)
    size = max(float(np.prod(a.shape)), 1.0)
    first = max((abs(x - y) for x, y in zip(a.first, b.first, strict=True)), default=0.0)
    return max(abs(a.norm - b.norm) / scale, first / (scale / size**0.5)) if a.norm else abs(b.norm)


def _parity(folder: Path, report: Report, provider: str) -> Claim:
    dense = folder / "dense.onnx"
    if not dense.is_file() or report.probe_given or report.verification.approximation is None:
        return Claim(
            name="parity", status="not checked", detail="dense.onnx is not in the bundle (export --keep-dense)"
        )
    feeds = _feeds(dense, report)
    a = run_session(make_session(dense, provider), feeds, dense.name)
    b = run_session(make_session(folder / "model.onnx", provider), feeds, "model.onnx")
    now, then = compare_outputs(a, b, what="parity").relative_l2, report.verification.approximation.relative_l2
    return _claim(
        "parity", abs(now - then) <= 1e-3 * max(then, 1e-3), f"approximation error {now:.4f}, reported {then:.4f}"
    )


def _accuracy(folder: Path, report: Report, dataset: Dataset | None, provider: str) -> Claim:
    if report.accuracy is None or dataset is None:
        why = "add --data with the evaluation data" if report.accuracy else "the report claims none"
        return Claim(name="accuracy", status="not checked", detail=why)
    claimed = report.accuracy.compressed
    if dataset.fingerprint() != claimed.data_fingerprint:
        return Claim(name="accuracy", status="not checked", detail="--data is not the data of the report")
    steps = report.preprocessing if dataset.kind == "images" else None
    result = evaluate(folder / "model.onnx", dataset, preprocessing=steps, provider=provider)
    # Another machine's kernels may tip an answer that is on the edge: two samples are allowed for that.
    slack = 200 / max(result.samples, 1)
    holds = abs((result.top1 or 0) - (claimed.top1 or 0)) <= slack
    return _claim("accuracy", holds, f"top-1 {result.top1:.2f} %, reported {claimed.top1:.2f} %")
