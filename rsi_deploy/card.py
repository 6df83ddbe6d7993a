"""The model card: the bundle's README.md, from the report and the model's own inputs and outputs."""

from pathlib import Path

from rsi_deploy.inputs import model_inputs
from rsi_deploy.report import Report
from rsi_deploy.summary import comparison_rows, verdict


def model_card(report: Report, model: Path) -> str:
    """Markdown: what it is, inputs and outputs, preprocessing, measured numbers, how to run it, every site."""
    settings = report.settings
    q = f", q = {settings.power_iterations}" if settings.method == "rsi" else ""
    lines = [
        f"# {report.source.model}, compressed",
        "",
        f"Low-rank factorization ({settings.method}{q}, rank {settings.rank}, seed {settings.seed}) by {report.tool}. "
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
        *(f"- input `{spec}`" for spec in model_inputs(model)),
        *(
            f"- output `{p.name}` {p.shape} for inputs {', '.join(map(str, report.probe_shapes.values()))}"
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
        "| weight | op | out x in | rank | decision | normalized error | spectral error |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {s.name} | {s.kind} | {_shape(s.out_features, s.in_features, s.groups)} | {s.rank or ''} | "
            f"{s.decision if s.reason == s.decision else f'{s.decision}: {s.reason}'} | "
            f"{_error(s.normalized_error, s.normalized_error_kind)} | {_number(s.spectral_error)} |"
            for s in report.sites
        ),
    ]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


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
        lines.append(f"- exporter (torch against dense ONNX): relative error {v.exporter.relative_l2:.1e}")
    if v.surgery:
        lines.append(f"- surgery (full-rank split against dense): relative error {v.surgery.relative_l2:.1e}")
    if v.approximation:
        lines.append(
            f"- approximation (compressed against dense, on probes): relative error {v.approximation.relative_l2:.3f}"
        )
    else:
        lines.append("- nothing: onnxruntime cannot run this model here")
    if b := report.softmax_bound:
        lines.append(
            f"- classifier head `{b.site}` alone: the softmax bound guarantees {b.guaranteed_unchanged:.1f} % of the "
            f"top-1 answers, {b.observed_unchanged:.1f} % stayed; {b.violations} violations in {b.samples} samples"
        )
    return lines


def _feeds(model: Path) -> str:
    feeds = []
    for spec in model_inputs(model):
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
        feeds.append(f'"{spec.name}": np.zeros({shape}, "{spec.dtype}")')
    return "{" + ", ".join(feeds) + "}"


def _shape(out_features: int, in_features: int, groups: int) -> str:
    return f"{out_features} x {in_features}" + (f" x {groups} groups" if groups > 1 else "")


def _error(value: float | None, kind: str | None) -> str:
    return "" if value is None else f"{'at most ' if kind == 'upper bound' else ''}{value:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
