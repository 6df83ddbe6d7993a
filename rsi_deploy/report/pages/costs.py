"""A bench page's sections on what a model costs besides latency: time by op type and site, memory, cold start."""

from collections.abc import Sequence

from rsi_deploy.benchmark.result import BenchDocument
from rsi_deploy.benchmark.sections import Profile
from rsi_deploy.core.text import human_bytes
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Bar, Bars

MOST = 20
"""Op types and sites of a picture; the table has all."""


def cost_sections(document: BenchDocument) -> list[Section]:
    """Those that hold something."""
    return [section for section in (_profile(document), _memory(document), _cold_start(document)) if section.blocks]


def _profile(document: BenchDocument) -> Section:
    profiles = document.profile
    labels = [p.label for p in profiles]
    ops = sorted({op for p in profiles for op in p.op_ms}, key=lambda op: -max(p.op_ms.get(op, 0) for p in profiles))
    blocks = []
    if ops:
        picture = Picture(
            name="ops",
            title="Time of each op type",
            description="Bars for each op type and model, milliseconds a call.",
            plot=Bars(
                bars=[Bar(label=op, value=p.op_ms.get(op, 0.0), series=p.label) for op in ops[:MOST] for p in profiles],
                axis=Axis(title="ms a call", zero=True, form=".4~g"),
                series=labels,
            ),
        )
        table = PageTable(
            caption="Milliseconds a call (nodes) of each op type, as onnxruntime runs them",
            columns=("op type", *[f"#{label}" for label in labels]),
            rows=[(op, *[f"{p.op_ms.get(op, 0):.4g} ({p.op_nodes.get(op, 0)})" for p in profiles]) for op in ops],
        )
        blocks.append(Block(picture=picture, table=table))
    if sites := _sites(profiles):
        blocks.append(sites)
    calls = "; ".join(f"{p.label}: {p.call_ms:.4g} ms in {p.calls} calls" for p in profiles)
    words = [f"The profiler itself makes calls slower: {calls}."] if profiles else []
    return Section(name="profile", title="Where the time goes", blocks=blocks, words=words)


def _sites(profiles: Sequence[Profile]) -> Block | None:
    names = list(dict.fromkeys(site.site for p in profiles for site in p.sites))
    if not names:
        return None
    times = [(p.label, {site.site: site for site in p.sites}) for p in profiles]
    slowest = sorted(names, key=lambda name: -max(t[name].total_ms for _, t in times if name in t))[:MOST]
    shown = [name for name in names if name in slowest]
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
    rows = []
    for name in names:
        cells = []
        for _, found in times:
            site = found.get(name)
            parts = [] if site is None else [site.right_ms, site.left_ms]
            split = " + ".join(f"{ms:.3g}" for ms in parts if ms is not None)
            cells.append("" if site is None else f"{site.total_ms:.4g}" + f" ({split})" * bool(split))
        rows.append((name, *cells))
    table = PageTable(
        caption="Milliseconds a call of each split site (first + second factor)",
        columns=("site", *[f"#{label}" for label, _ in times]),
        rows=rows,
    )
    return Block(picture=picture, table=table)


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
        description="Bars for each model: after importing onnxruntime, after loading the model, and at the most.",
        plot=Bars(
            bars=[Bar(label=a, value=v / 1e6, series=k, note=f"{a}, {k}: {human_bytes(v)}") for a, k, v in values],
            axis=Axis(title="MB", zero=True, form="~f"),
            series=kinds,
        ),
    )
    rows = [
        (
            m.label,
            *["" if b is None else human_bytes(b) for b in (m.import_bytes, m.loaded_bytes, m.peak_bytes)],
            "no ceiling" if m.limit_bytes is None else human_bytes(m.limit_bytes),
            {None: "", True: "fits", False: f"does not fit: ended in {m.stopped_in}"}[m.fits] + f" {m.detail}".rstrip(),
        )
        for m in document.memory
    ]
    table = PageTable(
        caption="Bytes in memory, each model in a process of its own",
        columns=("model", "#importing", "#loaded", "#peak", "#ceiling", ""),
        rows=rows,
    )
    return Section(name="memory", title="Memory", blocks=[Block(picture=picture, table=table)] if rows else [])


def _cold_start(document: BenchDocument) -> Section:
    phases = ("process", "import", "load", "first call")
    times = [(c, (c.process_ms, c.import_ms, c.load_ms, c.first_ms)) for c in document.cold_start]
    picture = Picture(
        name="cold",
        title="From nothing to the first answer",
        description="A bar for each model, made of the times to start a process, import, load and answer first.",
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
    rows = [
        (
            c.label,
            *[f"{ms:.1f}" for ms in parts],
            f"{c.total_ms:.1f}",
            f"{c.total_interval_ms[0]:.1f} to {c.total_interval_ms[1]:.1f}",
            c.verdict,
        )
        for c, parts in times
    ]
    table = PageTable(
        caption="Milliseconds, medians; the file is in the page cache",
        columns=("model", *[f"#{phase}" for phase in phases], "#in all", "#95 % interval", "verdict"),
        rows=rows,
    )
    blocks = [Block(picture=picture, table=table, wide=True)] if rows else []
    return Section(name="cold-start", title="Cold start", blocks=blocks)
