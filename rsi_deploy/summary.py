"""A report in a few rows and one sentence: the wording that terminal table and model card share."""

from rsi_deploy.accuracy import AccuracyResult
from rsi_deploy.measure import ArmResult
from rsi_deploy.report import Report

Row = tuple[str, str, str, str]


def comparison_rows(report: Report) -> list[Row]:
    """Quantity, dense, compressed, change: what a user wants to know first."""
    rows: list[Row] = []
    if report.accuracy:
        rows += _accuracy_rows(report.accuracy.dense, report.accuracy.compressed)
    d, c = report.dense, report.compressed
    rows += [
        ("file", human_bytes(d.bytes), human_bytes(c.bytes), f"{d.bytes / c.bytes:.2f}x smaller"),
        ("parameters", f"{d.params:,}", f"{c.params:,}", _kept(c.params, d.params)),
    ]
    if d.macs:  # unknown where the model could not be run
        rows.append(("MACs a sample", f"{d.macs:,}", f"{c.macs:,}", _kept(c.macs, d.macs)))
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


def verdict(report: Report) -> str:
    """One sentence: smaller by, faster or not, accuracy change."""
    parts = [f"{report.dense.bytes / report.compressed.bytes:.2f}x smaller"]
    parts.append(report.latency.arms[1].verdict if report.latency else "latency not measured")
    if report.accuracy and report.accuracy.dense.top1 is not None and report.accuracy.compressed.top1 is not None:
        parts.append(f"top-1 {report.accuracy.compressed.top1 - report.accuracy.dense.top1:+.2f} points")
    return ", ".join(parts) + "."


def milliseconds(arm: ArmResult) -> str:
    """Median latency with its 95 % interval."""
    low, high = arm.median_interval_ms
    return f"{arm.median_ms:.3f} ms [{low:.3f}, {high:.3f}]"


def human_bytes(count: int) -> str:
    """Bytes for people, in powers of ten.

    Example:
        >>> human_bytes(2_390_000)
        '2.39 MB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _accuracy_rows(dense: AccuracyResult, compressed: AccuracyResult) -> list[Row]:
    rows: list[Row] = []
    for name, a, b in (("top-1", dense.top1, compressed.top1), ("top-5", dense.top5, compressed.top5)):
        if a is not None and b is not None:
            rows.append((name, f"{a:.2f} %", f"{b:.2f} %", f"{b - a:+.2f} points"))
    if compressed.agreement is not None:
        rows.append(("same answer as dense", "", f"{compressed.agreement:.2f} %", f"of {compressed.samples} samples"))
    return rows


def _kept(after: int, before: int) -> str:
    return f"{after / before:.1%} kept" if before else ""
