"""The model card: the bundle's README.md, from the report and the model's inputs and outputs."""

import json
from pathlib import Path

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.text import in_markdown
from rsi_deploy.report.schema import Report
from rsi_deploy.report.summary import (
    checks_table,
    comparison_table,
    evidence_lines,
    points_table,
    precision_lines,
    probe_inputs,
    quality_table,
    request_text,
    site_notes,
    site_table,
    verdict,
)
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import is_text


def model_card(report: Report, model: Path) -> str:
    """Return the card as Markdown: inputs and outputs, preprocessing, results, how to run the model, every site."""
    try:
        specs: list[InputSpec] | None = list(model_inputs(model))
        inputs = [f"- input `{in_markdown(str(spec))}`" for spec in specs or ()]
    except ModelError as error:  # an input that is no tensor
        specs, inputs = None, [f"- {in_markdown(str(error))}"]
    quality, points = quality_table(report), points_table(report)
    shapes = ", ".join(map(str, report.probe_shapes.values()))
    lines = [
        f"# {in_markdown(report.source.model)}, compressed",
        "",
        f"{_method(report)} ({request_text(report.settings)}) by {report.tool}. "
        f"{len(report.split_sites)} of {len(report.sites)} weights are split; nothing was retrained. ",
        "",
        f"**{verdict(report)}**",
        "",
        *comparison_table(report).markdown(),
        *(["", f"{quality.caption}:", "", *quality.markdown()] if quality.rows else []),
        *(["", f"{points.caption}:", "", *points.markdown()] if points.rows else []),
        *(text for line in precision_lines(report) for text in ("", f"{in_markdown(line[0].upper() + line[1:])}.")),
        "",
        _measured_on(report),
        "",
        "## Inputs and outputs",
        "",
        *inputs,
        *(f"- output `{in_markdown(p.name)}` {p.shape} for inputs {shapes}" for p in report.probe),
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
        f"outputs = session.run(None, {'feeds' if specs is None else _feeds(specs)})",
        "```",
        "",
        "## Verification",
        "",
        *_verification(report),
        "",
        "## Sites",
        "",
        *site_table(report.sites, report.bits).markdown(),
        *(text for note in site_notes(report.sites) for text in ("", note)),
    ]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {in_markdown(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _method(report: Report) -> str:
    if report.precision is None:
        return "Low-rank factorization"
    return f"Low-rank factorization and {report.precision.scheme}" if report.split_sites else report.precision.scheme


def _measured_on(report: Report) -> str:
    e = report.environment
    where = f"Measured on {e.cpu}, {e.cores} cores"
    if report.latency is None:
        return f"{where}; latency was not measured (--no-bench)."
    threads = report.latency.threads or "default"
    return (
        f"{where}, {report.latency.provider}, batch {report.latency.batch}, threads: {threads}, onnxruntime "
        f"{report.latency.onnxruntime}. Times hold for this machine; measure on yours with `rsi-deploy bench`."
    )


def _verification(report: Report) -> list[str]:
    rows = [row for row in checks_table(report).rows if row[2] != "not measured"]
    inputs = probe_inputs(report)
    lines = [f"- {name} ({compared}): relative error {error} on {inputs}" for name, compared, error, *_ in rows]
    if report.verification.approximation is None:
        lines.append("- the compressed model was not run: onnxruntime cannot run it on this machine")
    return lines + [f"- {line}" for line in evidence_lines(report)]


def _feeds(specs: list[InputSpec]) -> str:
    """Return an example of the model's inputs as Python code."""
    feeds = []
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else 1 for dim in spec.shape)
        dtype = "str" if is_text(spec.dtype) else spec.dtype
        feeds.append(f'{json.dumps(spec.name)}: np.zeros({shape}, "{dtype}")')
    return "{" + ", ".join(feeds) + "}"
