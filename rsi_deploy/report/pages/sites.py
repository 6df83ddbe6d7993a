"""The sections of a report page on sites: size, ranks, spectra, errors and decisions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.report.pages.errors import errors_section, largest, of_all, spectra_section
from rsi_deploy.report.pages.page import Block, Picture, Section, block_of
from rsi_deploy.report.pages.plots import Axis, Bar, Bars
from rsi_deploy.report.summary import macs_kept, shape, share, site_notes, site_table
from rsi_deploy.report.table import Table

_FOLD = 16
"""Number of rows above which a table is folded."""


def sections_of_sites(sites: Sequence[SiteRecord]) -> list[Section]:
    """Return the sections that have something to show."""
    return [
        section
        for section in (
            _parameters(sites),
            _ranks(sites),
            spectra_section(sites),
            errors_section(sites),
            _decisions(sites),
        )
        if section.blocks
    ]


def _parameters(sites: Sequence[SiteRecord]) -> Section:
    known = [s for s in sites if s.params_dense]
    shown = largest(known)
    bars = [
        Bar(label=s.name, value=value, series=series, note=f"{s.name}, {series}: {value:,}")
        for s in shown
        for series, value in (("dense", s.params_dense), ("compressed", s.params_compressed))
    ]
    plot = Bars(bars=bars, axis=Axis(title="parameters", zero=True), series=("dense", "compressed"), overlaid=True)
    rows = [
        (
            s.name,
            f"{s.params_dense:,}",
            f"{s.params_compressed:,}",
            share(s.params_compressed, s.params_dense),
            macs_kept(s),
        )
        for s in shown
    ]
    picture = Picture(
        name="parameters",
        title="Parameters of each site, before and after",
        description="A bar for each site: its parameters in the dense model, and over it those in the compressed one.",
        plot=plot,
    )
    table = Table(
        caption=of_all(shown, known, "Parameters and multiply-accumulates (MACs)"),
        columns=("site", "#dense", "#compressed", "#kept", "#MACs kept"),
        rows=rows,
    )
    return Section(name="parameters", title="Size of each site", blocks=block_of(table, picture))


def _ranks(sites: Sequence[SiteRecord]) -> Section:
    split = [s for s in sites if s.rank and s.break_even_rank]
    shown = largest(split)
    bars = [
        Bar(
            label=s.name,
            value=100 * (s.rank or 0) / s.break_even_rank,
            note=f"{s.name}: rank {s.rank} of break-even {s.break_even_rank:.1f}",
        )
        for s in shown
    ]
    rows = [
        (
            s.name,
            shape(s),
            str(s.rank),
            f"{s.break_even_rank:.1f}",
            f"{100 * (s.rank or 0) / s.break_even_rank:.0f} %",
        )
        for s in shown
    ]
    picture = Picture(
        name="ranks",
        title="Rank as a share of the break-even rank",
        description="A bar for each split site: its rank in percent of its break-even rank.",
        plot=Bars(
            bars=bars, axis=Axis(title="% of break-even rank", zero=True, form="~f"), mark=(100, "saves nothing")
        ),
    )
    table = Table(
        caption=of_all(shown, split, "Ranks of the split sites"),
        columns=("site", "#out x in", "#rank", "#break-even", "#share"),
        rows=rows,
    )
    words = ["At its break-even rank, out*in/(out+in), a split holds as many numbers as the dense weight."]
    return Section(name="ranks", title="Ranks", blocks=block_of(table, picture), words=words)


def _decisions(sites: Sequence[SiteRecord]) -> Section:
    split = sum(bool(s.rank) for s in sites)
    reasons = Counter(s.reason for s in sites if not s.rank)
    words = [f"{split} of {len(sites)} sites are split, {len(sites) - split} stay dense."]
    words += site_notes(sites)
    common = reasons.most_common(12)
    rows = [(reason, str(count)) for reason, count in common]
    if len(reasons) > len(common):
        rows.append(("other reasons", str(reasons.total() - sum(count for _, count in common))))
    blocks = block_of(Table(caption="Why sites stay dense", columns=("reason", "#sites"), rows=rows))
    if sites:
        table = replace(site_table(sites), caption=f"Every site ({len(sites)})")
        blocks.append(Block(table=table, folded=len(sites) > _FOLD))
    return Section(name="decisions", title="Decision for each site", blocks=blocks, words=words)
