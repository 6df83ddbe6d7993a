"""A page's sections on sites: where the numbers went, ranks, what each lost, and every layer's decision."""

from collections import Counter
from collections.abc import Sequence

from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.report.pages.errors import errors_section, largest, of_all, spectra_section
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Bar, Bars
from rsi_deploy.report.summary import (
    LOSS,
    has_loss,
    normalized_error,
    operation,
    response_error,
)

_FOLD = 16
"""Rows from which a table is folded."""


def sections_of_sites(sites: Sequence[SiteRecord]) -> list[Section]:
    """Everything about the sites, as far as it was measured."""
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
    weighty = [s for s in sites if s.params_dense]
    shown = largest(weighty)
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
            _share(s.params_compressed, s.params_dense),
            _macs(s),
        )
        for s in shown
    ]
    picture = Picture(
        name="parameters",
        title="Parameters of each site, before and after",
        description="A bar for each site: its parameters when dense, and over it those it has now.",
        plot=plot,
    )
    table = PageTable(
        caption=of_all(shown, weighty, "Parameters and multiply-accumulates (MACs)"),
        columns=("site", "#dense", "#compressed", "#kept", "#MACs kept"),
        rows=rows,
    )
    blocks = [Block(picture=picture, table=table)] if shown else []
    return Section(name="parameters", title="Where the size went", blocks=blocks)


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
        title="Rank, as a share of the rank that would save nothing",
        description="A bar for each split site: its rank in percent of its break-even rank.",
        plot=Bars(
            bars=bars, axis=Axis(title="% of break-even rank", zero=True, form="~f"), mark=(100, "saves nothing")
        ),
    )
    table = PageTable(
        caption=of_all(shown, split, "Ranks of the split sites"),
        columns=("site", "#out x in", "#rank", "#break-even", "#share"),
        rows=rows,
    )
    blocks = [Block(picture=picture, table=table)] if shown else []
    words = ["At its break-even rank, out*in/(out+in), a split holds as many numbers as the dense weight."]
    return Section(name="ranks", title="Ranks", blocks=blocks, words=words)


def _decisions(sites: Sequence[SiteRecord]) -> Section:
    split = sum(bool(s.rank) for s in sites)
    reasons = Counter(s.reason for s in sites if not s.rank)
    words = [f"{split} of {len(sites)} sites are split, {len(sites) - split} stay dense."]
    words += [f"{LOSS.capitalize()}."] * any(has_loss(s) for s in sites)
    if any(s.joint for s in sites):
        words.append("Sites split jointly share one right factor; its parameters count at the first of them.")
    blocks = []
    if reasons:
        rows = [(reason, str(count)) for reason, count in reasons.most_common(12)]
        rows += [("other reasons", str(sum(reasons.values()) - sum(c for _, c in reasons.most_common(12))))] * (
            len(reasons) > 12
        )
        blocks.append(Block(table=PageTable(caption="Why sites stay dense", columns=("reason", "#sites"), rows=rows)))
    errors = [(normalized_error, "#normalized error"), (response_error, "#response error")]
    used = [(text, head) for text, head in errors if any(text(s) for s in sites)]
    table = PageTable(
        caption=f"Every site and why ({len(sites)})",
        columns=("site", "operation", "#out x in", "#rank", "#kept", *[head for _, head in used], "decision"),
        rows=[
            (
                s.name,
                operation(s),
                shape(s),
                str(s.rank or ""),
                _share(s.params_compressed, s.params_dense),
                *[text(s) for text, _ in used],
                s.decision if s.reason == s.decision else f"{s.decision}: {s.reason}",
            )
            for s in sites
        ],
    )
    blocks += [Block(table=table, folded=len(sites) > _FOLD)] if sites else []
    return Section(name="decisions", title="Every layer's decision", blocks=blocks, words=words)


def shape(site: SiteRecord) -> str:
    """Out x in, and how often where there are groups."""
    if not site.out_features:
        return ""
    return f"{site.out_features} x {site.in_features}" + f" x {site.groups}" * (site.groups > 1)


def _share(after: int, before: int) -> str:
    return f"{100 * after / before:.1f} %" if before else ""


def _macs(site: SiteRecord) -> str:
    return "" if site.macs_compressed is None else _share(site.macs_compressed, site.macs_dense or 0)
