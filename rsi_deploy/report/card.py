"""The model card: the bundle's README.md, from the report and the model's own inputs and outputs."""

import json
from collections.abc import Sequence
from pathlib import Path

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.core.text import in_markdown
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.report.schema import Report
from rsi_deploy.report.summary import (
    LOSS,
    RESPONSE,
    certificate_lines,
    comparison_rows,
    has_loss,
    operation,
    response_error,
    verdict,
)
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.values import is_text

JOINTLY = (
    "Sites split jointly share one right factor and the node that multiplies their input by it. Together they hold "
    "fewer numbers than apart, and none has a larger error. Their normalized errors compare with the best of that rank "
    "for each site alone."
)


def model_card(report: Report, model: Path) -> str:
    """Markdown: what it is, inputs and outputs, preprocessing, measured numbers, how to run it, every site."""
    lines = [
        f"# {in_markdown(report.source.model)}, compressed",
        "",
        f"Low-rank factorization ({_asked(report.settings)}) by {report.tool}. "
        f"{len(report.split_sites)} of {len(report.sites)} weights are split; nothing was retrained. ",
        "",
        f"**{verdict(report)}**",
        "",
        "| | dense | compressed | |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in comparison_rows(report)),
        "",
        _measured_on(report),
        "",
        "## Inputs and outputs",
        "",
        *_inputs(model),
        *(
            f"- output `{in_markdown(p.name)}` {p.shape} for inputs {', '.join(map(str, report.probe_shapes.values()))}"
            for p in report.probe
        ),
        "",
        f"Preprocessing: {report.preprocessing.describe() if report.preprocessing else 'unknown; feed ready inputs.'}",
        "",
        "## How to run it",
        "",
        "```python",
        "import numpy as np",
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
        f"outputs = session.run(None, {_feeds(model)})",
        "```",
        "",
        *_verification(report),
        "",
        "## Sites",
        "",
        *_sites(report.sites),
    ]
    if any(s.response_error is not None for s in report.sites):
        lines += ["", f"{RESPONSE.replace('response', 'Response error', 1)}."]
    if any(has_loss(s) for s in report.sites):
        lines += ["", f"{LOSS.capitalize()}."]
    if any(s.joint for s in report.sites):
        lines += ["", JOINTLY]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {in_markdown(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _asked(settings: ExportSettings) -> str:
    """What was asked for, in few words."""
    q = f", q = {settings.power_iterations}" if settings.method == "rsi" else ""
    ranks = settings.budget or f"rank {settings.rank}"
    fitted = ", fitted to calibration data" if settings.factors == "response" else ""
    return f"{settings.method}{q}, {ranks}{fitted}, seed {settings.seed}"


def _sites(sites: Sequence[SiteRecord]) -> list[str]:
    """A table with a line for each site; the errors of those fitted to data are those of their responses."""
    fitted = any(s.response_error is not None for s in sites)
    direct = any(s.normalized_error is not None for s in sites) or not fitted
    columns = ["weight", "op", "out x in", "rank", "decision"]
    columns += ["normalized error", "spectral error"] * direct + ["response error"] * fitted
    rows = [
        [
            in_markdown(s.name),
            in_markdown(operation(s)),
            _shape(s.out_features, s.in_features, s.groups),
            str(s.rank or ""),
            s.decision if s.reason == s.decision else in_markdown(f"{s.decision}: {s.reason}"),
            *[_error(s.normalized_error, s.normalized_error_kind), _number(s.spectral_error)] * direct,
            *[response_error(s)] * fitted,
        ]
        for s in sites
    ]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _measured_on(report: Report) -> str:
    e = report.environment
    where = f"Measured on {e.cpu}, {e.cores} cores"
    if report.latency is None:
        return f"{where}; latency was not measured (--no-bench)."
    threads = report.latency.threads or "default"
    return (
        f"{where}, {report.latency.provider}, batch {report.latency.batch}, threads: {threads}, onnxruntime "
        f"{report.latency.onnxruntime}. Times hold for this machine; measure again on yours with `rsi-deploy bench`."
    )


def _verification(report: Report) -> list[str]:
    v = report.verification
    lines = ["## Verification", ""]
    if v.exporter:
        lines.append(f"- exporter (the source against dense ONNX): relative error {v.exporter.relative_l2:.1e}")
    if v.surgery:
        lines.append(f"- surgery (full-rank split against dense): relative error {v.surgery.relative_l2:.1e}")
    if v.approximation:
        lines.append(
            f"- approximation (compressed against dense, on probes): relative error {v.approximation.relative_l2:.3f}"
        )
    else:
        lines.append("- nothing: onnxruntime cannot run this model here")
    lines += [f"- {line}" for line in certificate_lines(report)]
    return lines


def _inputs(model: Path) -> list[str]:
    try:
        return [f"- input `{in_markdown(str(spec))}`" for spec in model_inputs(model)]
    except ModelError as error:
        return [f"- {in_markdown(str(error))}"]


def _feeds(model: Path) -> str:
    """An example of what the model is fed; "feeds" where an input is no tensor."""
    feeds = []
    try:
        specs = model_inputs(model)
    except ModelError:
        return "feeds"
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
        dtype = "str" if is_text(spec.dtype) else spec.dtype
        feeds.append(f'{json.dumps(spec.name)}: np.zeros({shape}, "{dtype}")')
    return "{" + ", ".join(feeds) + "}"


def _shape(out_features: int, in_features: int, groups: int) -> str:
    return f"{out_features} x {in_features}" + (f" x {groups} groups" if groups > 1 else "")


def _error(value: float | None, kind: str | None) -> str:
    return "" if value is None else f"{'at most ' if kind == 'upper bound' else ''}{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
