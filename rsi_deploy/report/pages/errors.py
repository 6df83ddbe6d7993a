"""A page's sections on what a low rank costs at each site: spectra and errors."""

import math
from collections.abc import Sequence

import numpy as np

from rsi_deploy.core.sites import SiteRecord, Spectrum
from rsi_deploy.report.pages.page import Block, PageTable, Picture, Section
from rsi_deploy.report.pages.plots import Axis, Bar, Bars, Panel, Panels
from rsi_deploy.report.summary import RESPONSE, normalized_error, response_error

MOST = 48
"""Rows of a picture; beyond them the largest sites are drawn. The decisions list all."""

PANELS = 24
"""Spectra that are drawn."""


def largest(sites: Sequence[SiteRecord], most: int = MOST) -> list[SiteRecord]:
    """The sites with most parameters, in their old order."""
    kept = sorted(range(len(sites)), key=lambda i: -sites[i].params_dense)[:most]
    return [sites[i] for i in sorted(kept)]


def of_all(shown: Sequence[object], everything: Sequence[object], what: str) -> str:
    """A caption that says so where some are left out."""
    if len(shown) == len(everything):
        return what
    return f"{what}: the {len(shown)} largest of {len(everything)}"


def spectra_section(sites: Sequence[SiteRecord]) -> Section:
    """The singular values of split sites."""
    known = [(s, s.spectrum) for s in sites if s.spectrum is not None and s.rank]
    names = {s.name for s in largest([s for s, _ in known], PANELS)}
    shown = [(s, spectrum) for s, spectrum in known if s.name in names]
    panels = [
        Panel(
            label=s.name,
            points=[
                (100 * rank / spectrum.full_rank, max(value, 1e-4))
                for rank, value in zip(spectrum.ranks, spectrum.values, strict=True)
            ],
            cut=100 * (s.rank or 0) / spectrum.full_rank,
        )
        for s, spectrum in shown
    ]
    lowest = min((y for panel in panels for _, y in panel.points), default=0.1)
    picture = Picture(
        name="spectra",
        title="Singular values of each split site, and its rank (dashed)",
        description="A small curve for each site: singular values, relative to the largest, falling with the rank.",
        plot=Panels(
            panels=panels,
            x=Axis(title="rank, % of full", form="~f", ends=(0, 100)),
            y=Axis(title="", scale="log", form=".4~g", ends=(10 ** min(math.floor(math.log10(lowest)), -1), 1)),
        ),
    )
    rows = [
        (
            s.name,
            spectrum.of,
            str(s.rank),
            str(spectrum.full_rank),
            *[_at(spectrum, share) for share in (0.1, 0.25, 0.5)],
        )
        for s, spectrum in shown
    ]
    table = PageTable(
        caption=of_all(shown, known, "Singular values, relative to the largest, at shares of full rank"),
        columns=("site", "of its", "#rank", "#full", "#at 10 %", "#25 %", "#50 %"),
        rows=rows,
    )
    words = [
        "What falls steeply is worth a low rank; what stays flat has no low rank to find. Where a curve ends early, "
        "only the leading values were computed."
    ]
    blocks = [Block(picture=picture, table=table)] if shown else []
    return Section(name="spectra", title="Spectra", blocks=blocks, words=words)


def _at(spectrum: Spectrum, share: float) -> str:
    """The value at a share of full rank, read off between the known ones; "" beyond them."""
    rank = max(1.0, share * spectrum.full_rank)
    if rank > spectrum.ranks[-1]:
        return ""
    return f"{float(np.interp(rank, spectrum.ranks, spectrum.values)):.2g}"


def errors_section(sites: Sequence[SiteRecord]) -> Section:
    """What factors fitted to data lost of the responses, and the others of the weights."""
    blocks = []
    fitted = [s for s in sites if s.response_error is not None]
    if fitted:
        shown = largest(fitted)
        picture = Picture(
            name="responses",
            title="Response error of each site",
            description="A bar for each site fitted to data: the share of its output's variance that is lost.",
            plot=Bars(
                bars=[
                    Bar(label=s.name, value=100 * (s.response_error or 0), note=f"{s.name}: {response_error(s)}")
                    for s in shown
                ],
                axis=Axis(title="% of the output's variance lost", zero=True, form=".4~g"),
            ),
        )
        table = PageTable(
            caption=of_all(shown, fitted, "Response errors on calibration data"),
            columns=("site", "#rank", "#response error"),
            rows=[(s.name, str(s.rank), response_error(s)) for s in shown],
        )
        blocks.append(Block(words=[f"{RESPONSE.capitalize()}."], picture=picture, table=table))
    plain = [s for s in sites if s.spectral_error is not None]
    if plain:
        shown = largest(plain)
        picture = Picture(
            name="spectral",
            title="Spectral error of each weight",
            description="A bar for each split weight: the norm of what is missing, in percent of the weight's norm.",
            plot=Bars(
                bars=[
                    Bar(
                        label=s.name,
                        value=100 * (s.spectral_error or 0),
                        note=f"{s.name}: {100 * (s.spectral_error or 0):.1f} %, normalized {normalized_error(s)}",
                    )
                    for s in shown
                ],
                axis=Axis(title="% of the weight's spectral norm", zero=True, form=".4~g"),
            ),
        )
        table = PageTable(
            caption=of_all(shown, plain, "Errors of the factors against their weights"),
            columns=("site", "#rank", "#spectral", "#Frobenius", "#normalized"),
            rows=[
                (s.name, str(s.rank), _percent(s.spectral_error), _percent(s.frobenius_error), normalized_error(s))
                for s in shown
            ],
        )
        words = ["Normalized: in units of the best any factors of this rank can do, 1.00 is the optimum."]
        blocks.append(Block(words=words, picture=picture, table=table))
    return Section(name="errors", title="What each site lost", blocks=blocks)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
