"""The sections of a bench page on profile, memory and cold start."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.benchmark.sections import Profile
from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.bench_tables import cold_start_table, memory_table, op_table, site_time_table
from rsi_deploy.report.pages.page import Block, Picture, Section, block_of
from rsi_deploy.report.pages.plots import Axis, Bar, Bars

MOST = 20
"""Most op types or sites of a picture; the table has all."""


def cost_sections(document: BenchDocument) -> list[Section]:
    """Return the sections on profile, memory and cold start."""
    return [_profile(document), _memory(document), _cold_start(document)]


def _profile(document: BenchDocument) -> Section:
    profiles = document.profile
    labels = [p.label for p in profiles]
    table = op_table(profiles)
    picture = Picture(
        name="ops",
        title="Time of each op type",
        description="Bars for each op type and model, milliseconds a call.",
        plot=Bars(
            bars=[
                Bar(label=op, value=p.op_ms.get(op, 0.0), series=p.label)
                for op, *_ in table.rows[:MOST]
                for p in profiles
            ],
            axis=Axis(title="ms a call", zero=True, form=".4~g"),
            series=labels,
        ),
    )
    calls = "; ".join(f"{p.label}: {p.call_ms:.4g} ms in {p.calls} calls" for p in profiles)
    words = [f"The profiler itself makes calls slower: {calls}."] if profiles else []
    blocks = [*block_of(table, picture), *_sites(profiles)]
    return Section(name="profile", title="Profile", blocks=blocks, words=words)


def _sites(profiles: Sequence[Profile]) -> list[Block]:
    table = site_time_table(profiles)
    slowest = {row[0] for row in table.rows[:MOST]}
    shown = [name for name in dict.fromkeys(site.site for p in profiles for site in p.sites) if name in slowest]
    times = [(p.label, {site.site: site for site in p.sites}) for p in profiles]
    picture = Picture(
        name="sites",
        title="Time of each split site",
        description="Bars for each site and model: milliseconds a call in the nodes that hold its weight or factors.",
        plot=Bars(
            bars=[
                Bar(label=name, value=t[name].total_ms, series=label)
                for name in shown
                for label, t in times
                if name in t
            ],
            axis=Axis(title="ms a call", zero=True, form=".4~g"),
            series=[label for label, _ in times],
        ),
    )
    return block_of(table, picture)


def _memory(document: BenchDocument) -> Section:
    kinds = ("importing", "loaded", "peak")
    values = [
        (m.label, kind, value)
        for m in document.memory
        for kind, value in zip(kinds, (m.import_bytes, m.loaded_bytes, m.peak_bytes), strict=True)
        if value is not None
    ]
    picture = Picture(
        name="memory",
        title="Resident memory of a process",
        description="Bars for each model: after importing onnxruntime, after loading the model, and the peak.",
        plot=Bars(
            bars=[Bar(label=a, value=v / 1e6, series=k, note=f"{a}, {k}: {human_bytes(v)}") for a, k, v in values],
            axis=Axis(title="MB", zero=True, form="~f"),
            series=kinds,
        ),
    )
    return Section(
        name="memory",
        title="Memory",
        blocks=block_of(memory_table(document.memory).without_empty(), picture, wide=True),
    )


def _cold_start(document: BenchDocument) -> Section:
    phases = ("process", "import", "load", "first call")
    times = [(c, (c.process_ms, c.import_ms, c.load_ms, c.first_ms)) for c in document.cold_start]
    picture = Picture(
        name="cold",
        title="Time from the start of a process to the first answer",
        description="A bar for each model: time to start a process, import, load the model, and answer the first call.",
        plot=Bars(
            bars=[
                Bar(label=c.label, value=ms, series=phase)
                for c, parts in times
                for phase, ms in zip(phases, parts, strict=True)
            ],
            axis=Axis(title="ms", zero=True, form="~f"),
            series=phases,
            stacked=True,
        ),
    )
    blocks = block_of(cold_start_table(document.cold_start), picture, wide=True)
    return Section(name="cold-start", title="Cold start", blocks=blocks)
