"""The sections of a report page on sites: size, ranks, spectra, errors and decisions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.report.pages.errors import errors_section, largest, of_all, spectra_section
from rsi_deploy.report.pages.page import Block, Section, bar_chart, block_of
from rsi_deploy.report.pages.plots import Bar
from rsi_deploy.report.summary import macs_kept, shape, share, site_notes, site_table
from rsi_deploy.report.table import Table

_FOLD = 16
"""Number of rows above which a table is folded."""


def sections_of_sites(sites: Sequence[SiteRecord], bits: Mapping[str, int]) -> list[Section]:
    """Return the sections that have something to show; `bits` as for `site_table`."""
    decisions = _decisions(sites, bits)
    sections = (_parameters(sites), _ranks(sites), spectra_section(sites), errors_section(sites), decisions)
    return [section for section in sections if section.blocks]


def _parameters(sites: Sequence[SiteRecord]) -> Section:
    known = [s for s in sites if s.params_dense]
    shown = largest(known)
    kinds = ("dense", "compressed")
    bars = [
        Bar(label=s.name, value=value, series=kind, note=f"{s.name}, {kind}: {value:,}")
        for s in shown
        for kind, value in zip(kinds, (s.params_dense, s.params_compressed), strict=True)
    ]
    title = "Parameters of each site, before and after"
    what = "A bar for each site: its parameters in the dense model, and over it those in the compressed one."
    picture = bar_chart("parameters", title, what, bars, "parameters", form="~s", series=kinds, overlaid=True)
    table = Table(
        caption=of_all(shown, known, "Parameters and multiply-accumulates (MACs)"),
        columns=("site", "#dense", "#compressed", "#kept", "#MACs kept"),
        rows=[
            (s.name, f"{dense:,}", f"{compressed:,}", share(compressed, dense), macs_kept(s))
            for s in shown
            for dense, compressed in [(s.params_dense, s.params_compressed)]
        ],
    )
    return Section(name="parameters", title="Size of each site", blocks=block_of(table, picture))


def _ranks(sites: Sequence[SiteRecord]) -> Section:
    split = [s for s in sites if s.rank and s.break_even_rank]
    shown = [(s, 100 * (s.rank or 0) / s.break_even_rank) for s in largest(split)]
    bars = [
        Bar(label=s.name, value=percent, note=f"{s.name}: rank {s.rank} of break-even {s.break_even_rank:.1f}")
        for s, percent in shown
    ]
    title = "Rank as a share of the break-even rank"
    what = "A bar for each split site: its rank in percent of its break-even rank."
    mark = (100, "saves nothing")
    picture = bar_chart("ranks", title, what, bars, "% of break-even rank", form="~f", mark=mark)
    table = Table(
        caption=of_all(shown, split, "Ranks of the split sites"),
        columns=("site", "#out x in", "#rank", "#break-even", "#share"),
        rows=[(s.name, shape(s), str(s.rank), f"{s.break_even_rank:.1f}", f"{percent:.0f} %") for s, percent in shown],
    )
    words = [
        "At its break-even rank a split holds as many numbers as the dense weight: out*in/(out+in), or min(out, in) in "
        "the pivoted form, or all inputs in the forms units and heads."
    ]
    return Section(name="ranks", title="Ranks", blocks=block_of(table, picture), words=words)


def _decisions(sites: Sequence[SiteRecord], bits: Mapping[str, int]) -> Section:
    outcomes = Counter(s.outcome for s in sites)
    reasons = Counter(s.kind_of_reason for s in sites if not s.rank)
    smaller = f"{outcomes['smaller']} make fewer hidden units or values of heads, " if outcomes["smaller"] else ""
    words = [f"{outcomes['split']} of {len(sites)} sites are split, {smaller}{outcomes['dense']} stay dense."]
    words += site_notes(sites)
    common = reasons.most_common(12)
    rows = [(reason, str(count)) for reason, count in common]
    if len(reasons) > len(common):
        rows.append(("other reasons", str(reasons.total() - sum(count for _, count in common))))
    blocks = block_of(Table(caption="Why sites are not split", columns=("reason", "#sites"), rows=rows))
    if sites:
        table = replace(site_table(sites, bits), caption=f"Every site ({len(sites)})")
        blocks.append(Block(table=table, folded=len(sites) > _FOLD))
    return Section(name="decisions", title="Decision for each site", blocks=blocks, words=words)
