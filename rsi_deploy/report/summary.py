"""A report in a few rows and one sentence: the wording that terminal table and model card share."""

from typing import TYPE_CHECKING

from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.core.sites import site_name
from rsi_deploy.core.text import human_bytes as human_bytes
from rsi_deploy.core.text import share_kept, size_change
from rsi_deploy.evaluation.accuracy import AccuracyResult

if TYPE_CHECKING:  # a machine that only measures has no torch
    from rsi_deploy.core.sites import SiteRecord
    from rsi_deploy.report.schema import Report

Row = tuple[str, str, str, str]

RESPONSE = "response: share of a site's output variance that is lost, on calibration data"
LOSS = "loss: how far the split of that site alone moves the model's outputs, estimated"


def comparison_rows(report: "Report") -> list[Row]:
    """Quantity, dense, compressed, change: what a user wants to know first."""
    rows: list[Row] = []
    if report.accuracy:
        rows += _accuracy_rows(report.accuracy.dense, report.accuracy.compressed)
    d, c = report.dense, report.compressed
    rows += [
        ("file", human_bytes(d.bytes), human_bytes(c.bytes), size_change(d.bytes, c.bytes)),
        ("parameters", f"{d.params:,}", f"{c.params:,}", share_kept(d.params, c.params)),
    ]
    if d.macs:  # unknown where the model could not be run
        rows.append(("MACs a sample", f"{d.macs:,}", f"{c.macs:,}", share_kept(d.macs, c.macs)))
    if report.latency:
        dense, compressed = report.latency.arms
        rows.append(
            (
                f"latency, batch {report.latency.batch}",
                milliseconds(dense),
                milliseconds(compressed),
                compressed.verdict,
            )
        )
    return rows


def verdict(report: "Report") -> str:
    """One sentence: the change of the size, of the time, of the accuracy."""
    parts = [size_change(report.dense.bytes, report.compressed.bytes)]
    parts.append(report.latency.arms[1].verdict if report.latency else "latency not measured")
    if report.accuracy and report.accuracy.dense.top1 is not None and report.accuracy.compressed.top1 is not None:
        parts.append(f"top-1 {report.accuracy.compressed.top1 - report.accuracy.dense.top1:+.2f} points")
    return ", ".join(parts) + "."


def certificate_lines(report: "Report") -> list[str]:
    """What calibration and the softmax bound vouch for, a line each."""
    lines = []
    if c := report.calibration:
        checked = f", {c.checked:,} of them checked" if c.checked != c.samples else ""
        ranks_alone = ", for ranks alone" if report.settings.factors == "weights" else ""
        found = [
            "the dense outputs are all zero" if c.output_error is None else f"output error {100 * c.output_error:.2g} %"
        ]
        found += [] if c.divergence is None else [f"KL {c.divergence:.2g}"]
        found += [] if c.agreement is None else [f"agreement {c.agreement:.1f} %"]
        lines.append(f"calibration, {c.samples:,} samples{checked}{ranks_alone}: {', '.join(found)}")
    if b := report.softmax_bound:
        lines.append(
            f"unchanged top-1, {site_name(b.site)} alone: guaranteed {b.guaranteed_unchanged:.1f} %, observed "
            f"{b.observed_unchanged:.1f} % (softmax bound, {b.violations} violations)"
        )
    return lines


def operation(site: "SiteRecord") -> str:
    """The operation, and for the split of a Conv its form; a product has one form only."""
    return site.kind if site.form in (None, "matmul", "gemm") else f"{site.kind} {site.form}"


def has_loss(site: "SiteRecord") -> bool:
    """Whether its rank was chosen by what it loses."""
    return site.reason.startswith("loss ")


def normalized_error(site: "SiteRecord") -> str:
    """In units of the optimum, with a sign where it is an upper bound; "" where it was not measured."""
    if site.normalized_error is None:
        return ""
    return f"{'≤ ' if site.normalized_error_kind != 'exact' else ''}{site.normalized_error:.2f}"


def response_error(site: "SiteRecord") -> str:
    """In percent; "" where the factors were not fitted to data."""
    return "" if site.response_error is None else f"{100 * site.response_error:.2g} %"


def milliseconds(arm: VariantResult) -> str:
    """Median latency with its 95 % interval."""
    low, high = arm.median_interval_ms
    return f"{arm.median_ms:.3f} ms [{low:.3f}, {high:.3f}]"


def _accuracy_rows(dense: AccuracyResult, compressed: AccuracyResult) -> list[Row]:
    rows: list[Row] = []
    for name, a, b in (("top-1", dense.top1, compressed.top1), ("top-5", dense.top5, compressed.top5)):
        if a is not None and b is not None:
            tested = compressed.paired if name == "top-1" else None
            ends = "" if tested is None else " [{:+.2f}, {:+.2f}]".format(*tested.change_interval)
            rows.append((name, f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f} points{ends}"))
    if compressed.agreement is not None:
        rows.append(("same answer as dense", "", f"{compressed.agreement:.2f} %", f"of {compressed.samples} samples"))
    return rows
