"""The page of a bundle. What was not measured is named next to the results."""

import hashlib

from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.text import human_bytes, human_count, share_kept, size_change
from rsi_deploy.report.bench_tables import machine_text, speed_tone
from rsi_deploy.report.pages.environment import environment_section
from rsi_deploy.report.pages.html import render
from rsi_deploy.report.pages.latency import latency_section
from rsi_deploy.report.pages.page import Block, Page, Section, Tile, bar_chart, block_of
from rsi_deploy.report.pages.plots import Bar
from rsi_deploy.report.pages.precision import precision_section
from rsi_deploy.report.pages.sites import sections_of_sites
from rsi_deploy.report.schema import Report, TimingRecord
from rsi_deploy.report.summary import (
    checks_table,
    comparison_table,
    evidence_lines,
    probe_inputs,
    quality_limits,
    quality_rows,
    quality_table,
    quality_words,
    request_text,
    verdict,
)
from rsi_deploy.report.table import Table, Tone


def report_page(report: Report, document: str) -> str:
    """Return the page of a bundle as HTML.

    Args:
        report: the report.
        document: the content of report.json; the page holds its sha256 (see `html.source_of`).
    """
    return render(page_of_report(report, hashlib.sha256(document.encode()).hexdigest()))


def page_of_report(report: Report, source: str = "") -> Page:
    """Return the page of a report; `source` is the sha256 of its document, or ""."""
    sections = [
        Section(
            name="result",
            title="Dense against compressed",
            blocks=[*block_of(comparison_table(report)), *block_of(quality_table(report))],
        ),
        *([precision_section(report)] if report.precision else []),
        *([latency_section(report.latency)] if report.latency else []),
        *sections_of_sites(report.sites, report.bits),
        _checks(report),
        _work(report),
        environment_section(report.environment),
    ]
    return Page(
        title=f"{report.source.model}, compressed",
        kind=f"Report of {report.tool}",
        verdict=verdict(report),
        facts=_facts(report),
        tiles=[_size(report), _parameters(report), _latency(report), _accuracy(report)],
        remarks=_remarks(report),
        sections=sections,
        source=source,
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    return [
        ("Request", request_text(report.settings)),
        *([("Timing", _timing(report.timing))] if report.timing else []),
        ("Split", f"{len(report.split_sites)} of {len(report.sites)} weights; nothing was retrained"),
        ("Machine", machine_text(report.environment)),
        ("Created", report.created),
    ]


def _timing(timing: TimingRecord) -> str:
    predicted = "" if timing.predicted is None else f"; predicted: {100 * timing.predicted:.0f} % of the dense time"
    return f"{timing.last_word}; times: {timing.source}{predicted}"


def _size(report: Report) -> Tile:
    d, c = report.dense, report.compressed
    return Tile(
        label="File",
        before=human_bytes(d.bytes),
        after=human_bytes(c.bytes),
        change=size_change(d.bytes, c.bytes),
        tone="good" if c.bytes < d.bytes else "neutral" if c.bytes == d.bytes else "bad",
    )


def _parameters(report: Report) -> Tile:
    d, c = report.dense, report.compressed
    macs = f", {c.macs / d.macs:.1%} of the MACs" if d.macs else ", MACs unknown"
    return Tile(
        label="Parameters",
        before=human_count(d.params),
        after=human_count(c.params),
        change=share_kept(d.params, c.params) + macs,
    )


def _latency(report: Report) -> Tile:
    if report.latency is None:
        return Tile(label="Latency", after="not measured", change="run rsi-deploy bench", tone="missing")
    dense, compressed = report.latency.arms
    return Tile(
        label=f"Latency, batch {report.latency.batch}",
        before=f"{dense.median_ms:.3g} ms",
        after=f"{compressed.median_ms:.3g} ms",
        change=compressed.verdict,
        tone=speed_tone(compressed),
    )


def _accuracy(report: Report) -> Tile:
    if report.accuracy and report.accuracy.dense.top1 is not None and report.accuracy.compressed.top1 is not None:
        before, after = report.accuracy.dense, report.accuracy.compressed
        points = (after.top1 or 0) - (before.top1 or 0)
        low = before.top1_interval[0] if before.top1_interval else before.top1 or 0
        tone: Tone = "bad" if (after.top1 or 0) < low else "good"
        return Tile(
            label=f"Top-1 of {after.samples:,} samples",
            before=f"{before.top1:.2f} %",
            after=f"{after.top1:.2f} %",
            change=f"{points:+.2f} points",
            tone=tone,
        )
    if report.calibration:
        return _quality(report.calibration)
    v = report.verification.approximation
    if v is not None:
        return Tile(
            label="Accuracy",
            after="not measured",
            change=f"no --data; relative error of the outputs on {probe_inputs(report)}: {v.relative_l2:.3f}",
            tone="missing",
        )
    return Tile(label="Accuracy", after="not measured", change="no --data", tone="missing")


def _quality(record: CalibrationRecord) -> Tile:
    """Return the tile of the quality of the outputs on the check part."""
    checked, no_data = record.quality, "accuracy was not measured (no --data)"
    rows = quality_rows(checked, record.in_sample)
    if not rows:
        return Tile(label="Outputs", after="all zero", change=no_data, tone="missing")
    name, value, in_sample = rows[0]
    value, _, ends = value.partition(" [")
    interval = f"95 % interval [{ends}" if ends else "no interval"
    inside = "" if record.checked is None else f"; {in_sample} in-sample"
    return Tile(
        label=f"{name[0].upper()}{name[1:]}, {record.part}",
        after=value,
        change=f"{interval}, {checked.samples:,} samples{inside}; {no_data}",
        tone="bad" if checked.is_broken else "neutral",
    )


def _remarks(report: Report) -> list[str]:
    remarks = [] if report.calibration is None else quality_limits(report.calibration)
    if report.calibration is not None and report.calibration.quality.is_broken:
        kept = quality_words(report.calibration.quality)[0]
        remarks.insert(0, f"The outputs are broken: {kept}, {report.calibration.part}. Do not use this model.")
    if report.latency is not None:
        compressed = report.latency.arms[1]
        if speed_tone(compressed) == "bad":
            remarks.append(
                f"The compressed model is slower than the dense one on this machine: {compressed.verdict}. For speed, "
                "use the dense model here, or split fewer sites (--exclude)."
            )
        elif speed_tone(compressed) == "neutral":
            remarks.append(f"The compressed model is not shown to be faster on this machine: {compressed.verdict}.")
    else:
        remarks.append("Latency was not measured, so it is not known whether this model is faster.")
    load, cores = report.environment.load_average, report.environment.cores
    if report.latency is not None and load is not None and load[0] > cores:
        remarks.append(f"The machine was busy when the report was written: load {load[0]:.1f} on {cores} cores.")
    if report.accuracy is None:
        remarks.append("Accuracy was not measured: export with --data, or run rsi-deploy eval on labelled data.")
    if report.verification.approximation is None:
        remarks.append("The compressed model was not verified: onnxruntime cannot run it on this machine.")
    latency = report.latency.notes if report.latency else ()
    remarks += [*report.notes, *report.source.notes, *(f"latency: {note}" for note in latency)]
    return list(dict.fromkeys(remark[:1].upper() + remark[1:] for remark in remarks))


def _checks(report: Report) -> Section:
    hashes = [*report.files.items(), ("source weights", report.source.hash)]
    words = [line[0].upper() + line[1:] + "." for line in evidence_lines(report)]
    words.append("rsi-deploy verify computes these results again from the bundle.")
    files = Table(caption="SHA-256 of the files and of the source weights", columns=("file", "digest"), rows=hashes)
    blocks = [Block(table=checks_table(report)), Block(table=files, folded=True)]
    return Section(name="checks", title="Verification", blocks=blocks, words=words)


def _work(report: Report) -> Section:
    stages = report.stages
    total = sum(stage.seconds for stage in stages)
    bars = [Bar(label=s.name, value=s.seconds, note=f"{s.name}: {s.seconds:.2f} s") for s in stages]
    what = "A bar for each step of the export, in seconds."
    picture = bar_chart("stages", "Time of each step", what, bars, "seconds")
    table = Table(
        caption=f"Total {total:.1f} s, peak memory {human_bytes(report.peak_memory)}",
        columns=("step", "#seconds", "#share"),
        rows=[(s.name, f"{s.seconds:.2f}", f"{s.seconds / total:.0%}" if total else "") for s in stages],
    )
    settings = [(name, _text(value)) for name, value in report.settings.model_dump().items()]
    settings.insert(0, ("command", report.command))
    settings.append(("preprocessing", report.preprocessing.describe() if report.preprocessing else "unknown"))
    folded = Block(table=Table(caption="Settings", columns=("setting", "value"), rows=settings), folded=True)
    return Section(name="work", title="Steps and settings", blocks=[*block_of(table, picture), folded])


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
