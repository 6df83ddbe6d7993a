"""The page of a run of `bench`."""

import os
from collections.abc import Iterable
from typing import Any

from rsi_deploy.benchmark.result import BenchDocument, VariantFile
from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.bench_tables import accuracy_table, cell_notes, machine_text, speed_tone, text_table, value_table
from rsi_deploy.report.pages.cells import distributions_section, pareto_section, results_section, scaling_section
from rsi_deploy.report.pages.costs import cost_sections
from rsi_deploy.report.pages.environment import environment_section
from rsi_deploy.report.pages.html import render
from rsi_deploy.report.pages.load import load_sections
from rsi_deploy.report.pages.page import Page, Section, Tile, block_of
from rsi_deploy.report.table import Table

MOST_TILES = 8


def bench_page(document: BenchDocument) -> str:
    """Return the page of a run of `bench` as HTML."""
    return render(page_of_bench(document))


def page_of_bench(document: BenchDocument, source: str = "") -> Page:
    """Return the page of a document; `source` is the sha256 of its file, or ""."""
    document = _with_short_labels(document)
    sections = [
        results_section(document),
        pareto_section(document),
        scaling_section(document),
        distributions_section(document),
        *cost_sections(document),
        *load_sections(document),
        _accuracy(document),
        _files(document),
        environment_section(document.environment),
    ]
    return Page(
        title=" against ".join(arm.label for arm in document.arms[:4]) + ", ..." * (len(document.arms) > 4),
        kind=f"Benchmark by {document.tool}",
        verdict=_verdict(document),
        facts=_facts(document),
        tiles=[_tile(document, arm) for arm in document.arms[:MOST_TILES]],
        remarks=_remarks(document),
        sections=[section for section in sections if section.blocks],
        source=source,
    )


def _with_short_labels(document: BenchDocument) -> BenchDocument:
    """Return the document with labels without the folder that all of them share; the table of files has the paths."""
    labels = [arm.label for arm in document.arms]
    folder = os.path.commonprefix([label.rpartition("/")[0] + "/" for label in labels])  # noqa: RUF071 - cut at a slash
    begins = folder[: folder.rfind("/") + 1]
    short = {label: label.removeprefix(begins) for label in labels}

    def renamed(records: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(r.model_copy(update={"label": short.get(r.label, r.label)}) for r in records)

    sections = ("arms", "cold_start", "memory", "generation", "bursts", "streams", "throughput", "profile")
    update: dict[str, Any] = {name: renamed(getattr(document, name)) for name in sections}
    update["cells"] = tuple(cell.model_copy(update={"arms": renamed(cell.arms)}) for cell in document.cells)
    for name in ("accuracy", "loadgen"):
        update[name] = {short.get(label, label): found for label, found in getattr(document, name).items()}
    return document.model_copy(update=update)


def _verdict(document: BenchDocument) -> str:
    """Return the verdicts of the first configuration in a sentence, and counts for the others."""
    if not document.cells:
        return "No latency was measured."
    cell = document.cells[0]
    if len(cell.arms) == 1:
        return f"{cell.arms[0].median_ms:.4g} ms a call, {cell.name}."
    verdicts = "; ".join(f"{arm.label}: {arm.verdict}" for arm in cell.arms[1:4])
    others = [speed_tone(arm) for other in document.cells[1:] for arm in other.arms[1:]]
    counts = [f"{others.count(tone)} {word}" for tone, word in _WORDS.items() if tone in others]
    return f"{verdicts} ({cell.name})." + (f" In the other configurations: {', '.join(counts)}." if counts else "")


_WORDS = {"good": "faster", "neutral": "without a difference shown", "bad": "slower"}


def _facts(document: BenchDocument) -> list[tuple[str, str]]:
    providers = dict.fromkeys(cell.provider for cell in document.cells)
    return [
        ("Measured", ", ".join(cell.name for cell in document.cells[:6]) + ", ..." * (len(document.cells) > 6)),
        ("On", ", ".join(providers)),
        ("Machine", machine_text(document.environment)),
        ("Created", document.created.isoformat(timespec="seconds")),
        *([("Command", document.command)] if document.command else []),
    ]


def _tile(document: BenchDocument, file: VariantFile) -> Tile:
    arm = next((arm for cell in document.cells[:1] for arm in cell.arms if arm.label == file.label), None)
    size = human_bytes(file.file_bytes)
    if arm is None:
        return Tile(label=file.label, after=size, change="latency not measured", tone="missing")
    return Tile(
        label=f"{file.label}, {size}",
        after=f"{arm.median_ms:.4g} ms",
        change=arm.verdict if arm.speedup else "",
        tone=speed_tone(arm),
    )


def _remarks(document: BenchDocument) -> list[str]:
    remarks = ["This run is partial: it was interrupted, or a configuration has too few blocks."] * document.partial
    slower = [
        f"{arm.label} is slower at {cell.name}: {arm.verdict}."
        for cell in document.cells
        for arm in cell.arms[1:]
        if speed_tone(arm) == "bad"
    ]
    remarks += slower[:8] + [f"{len(slower) - 8} more results are slower."] * (len(slower) > 8)
    load, cores = document.environment.load_average, document.environment.cores
    if load is not None and load[0] > cores:
        remarks.append(f"The machine was busy before the run: load {load[0]:.1f} on {cores} cores.")
    if document.load_after is not None and document.load_after[0] > cores + 1:
        remarks.append(f"The machine was busy after the run: load {document.load_after[0]:.1f} on {cores} cores.")
    invalid = [f"{k}, {r.scenario}" for k, results in document.loadgen.items() for r in results if not r.valid]
    remarks += [f"INVALID according to LoadGen: {'; '.join(invalid)}."] * bool(invalid)
    remarks += [*document.notes, *cell_notes(document.cells)]
    return list(dict.fromkeys(remarks))


def _accuracy(document: BenchDocument) -> Section:
    results = list(document.accuracy.items())
    blocks = [*block_of(accuracy_table(results)), *block_of(text_table(results)), *block_of(value_table(results))]
    return Section(name="accuracy", title="Accuracy", blocks=blocks)


def _files(document: BenchDocument) -> Section:
    rows = [(f.label, f.model, f.format, human_bytes(f.file_bytes), f.sha256) for f in document.arms]
    table = Table(caption="Files of the models", columns=("model", "file", "format", "#size", "SHA-256"), rows=rows)
    return Section(name="files", title="Files", blocks=block_of(table))
