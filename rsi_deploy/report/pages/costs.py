"""The sections of a bench page on profile, memory and cold start."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.benchmark.sections import Profile
from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.bench_tables import cold_start_table, memory_table, op_table, site_time_table
from rsi_deploy.report.pages.page import Block, Section, bar_chart, block_of
from rsi_deploy.report.pages.plots import Bar

MOST = 20
"""Most op types or sites of a picture; the table has all."""


def cost_sections(document: BenchDocument) -> list[Section]:
    """Return the sections on profile, memory and cold start."""
    return [_profile(document), _memory(document), _cold_start(document)]


def _profile(document: BenchDocument) -> Section:
    profiles = document.profile
    table = op_table(profiles)
    shown = [op for op, *_ in table.rows[:MOST]]
    bars = [Bar(label=op, value=p.op_ms.get(op, 0.0), series=p.label) for op in shown for p in profiles]
    what = "Bars for each op type and model, milliseconds a call."
    labels = [p.label for p in profiles]
    picture = bar_chart("ops", "Time of each op type", what, bars, "ms a call", series=labels)
    calls = "; ".join(f"{p.label}: {p.call_ms:.4g} ms in {p.calls} calls" for p in profiles)
    words = [f"The profiler itself makes calls slower: {calls}."] if profiles else []
    blocks = [*block_of(table, picture), *_sites(profiles)]
    return Section(name="profile", title="Profile", blocks=blocks, words=words)


def _sites(profiles: Sequence[Profile]) -> list[Block]:
    table = site_time_table(profiles)
    slowest = {row[0] for row in table.rows[:MOST]}
    shown = [name for name in dict.fromkeys(site.site for p in profiles for site in p.sites) if name in slowest]
    times = {p.label: {site.site: site.total_ms for site in p.sites} for p in profiles}
    bars = [Bar(label=n, value=t[n], series=label) for n in shown for label, t in times.items() if n in t]
    what = "Bars for each site and model: milliseconds a call in the nodes that hold its weight or factors."
    picture = bar_chart("sites", "Time of each split site", what, bars, "ms a call", series=list(times))
    return block_of(table, picture)


def _memory(document: BenchDocument) -> Section:
    kinds = ("importing", "loaded", "peak")
    bars = [
        Bar(label=m.label, value=size / 1e6, series=kind, note=f"{m.label}, {kind}: {human_bytes(size)}")
        for m in document.memory
        for kind, size in zip(kinds, (m.import_bytes, m.loaded_bytes, m.peak_bytes), strict=True)
        if size is not None
    ]
    what = "Bars for each model: after importing onnxruntime, after loading the model, and the peak."
    picture = bar_chart("memory", "Resident memory of a process", what, bars, "MB", form="~f", series=kinds)
    blocks = block_of(memory_table(document.memory).without_empty(), picture, wide=True)
    return Section(name="memory", title="Memory", blocks=blocks)


def _cold_start(document: BenchDocument) -> Section:
    phases = ("process", "import", "load", "first call")
    bars = [
        Bar(label=c.label, value=ms, series=phase)
        for c in document.cold_start
        for phase, ms in zip(phases, (c.process_ms, c.import_ms, c.load_ms, c.first_ms), strict=True)
    ]
    title = "Time from the start of a process to the first answer"
    what = "A bar for each model: time to start a process, import, load the model, and answer the first call."
    picture = bar_chart("cold", title, what, bars, "ms", form="~f", series=phases, stacked=True)
    blocks = block_of(cold_start_table(document.cold_start), picture, wide=True)
    return Section(name="cold-start", title="Cold start", blocks=blocks)
