"""The sections of a report page on spectra and errors of the sites."""

import math
from collections.abc import Sequence

import numpy as np

from rsi_deploy.core.sites import SiteRecord, Spectrum
from rsi_deploy.report.pages.page import Picture, Section, bar_chart, block_of
from rsi_deploy.report.pages.plots import Axis, Bar, Panel, Panels
from rsi_deploy.report.summary import NORMALIZED, RESPONSE, in_sample_error, normalized_error, response_error
from rsi_deploy.report.table import Table

MOST = 48
"""Most sites of a picture; the largest are drawn. The table of decisions has all."""

PANELS = 24
"""Most spectra that are drawn."""


def largest(sites: Sequence[SiteRecord], most: int = MOST) -> list[SiteRecord]:
    """Return the sites with most parameters, in their order in the model."""
    kept = sorted(range(len(sites)), key=lambda i: -sites[i].params_dense)[:most]
    return [sites[i] for i in sorted(kept)]


def of_all(shown: Sequence[object], everything: Sequence[object], what: str) -> str:
    """Return the caption, with a count if some sites are left out."""
    if len(shown) == len(everything):
        return what
    return f"{what}: the {len(shown)} largest of {len(everything)}"


def spectra_section(sites: Sequence[SiteRecord]) -> Section:
    """Return the section with the singular values of split sites."""
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
        description="A small curve for each site: its singular values, relative to the largest, over the rank.",
        plot=Panels(
            panels=panels,
            x=Axis(title="rank, % of full", form="~f", ends=(0, 100)),
            y=Axis(title="", scale="log", form=".4~g", ends=(10 ** min(math.floor(math.log10(lowest)), -1), 1)),
        ),
    )
    rows = [
        (s.name, spectrum.of, str(s.rank), str(spectrum.full_rank), *[_at(spectrum, x) for x in (0.1, 0.25, 0.5)])
        for s, spectrum in shown
    ]
    table = Table(
        caption=of_all(shown, known, "Singular values, relative to the largest, at shares of full rank"),
        columns=("site", "spectrum of", "#rank", "#full", "#at 10 %", "#25 %", "#50 %"),
        rows=rows,
    )
    words = [
        "A weight whose curve falls steeply is approximated well by a low rank; one with a flat curve is not. Where a "
        "curve ends early, only the largest values were computed."
    ]
    return Section(name="spectra", title="Spectra", blocks=block_of(table, picture), words=words)


def _at(spectrum: Spectrum, share: float) -> str:
    """Return the singular value at a share of full rank, interpolated; "" beyond the computed ones."""
    rank = max(1.0, share * spectrum.full_rank)
    if rank > spectrum.ranks[-1]:
        return ""
    return f"{float(np.interp(rank, spectrum.ranks, spectrum.values)):.2g}"


def errors_section(sites: Sequence[SiteRecord]) -> Section:
    """Return the section with the response errors of fitted factors and the errors against the weights."""
    fitted = [s for s in sites if s.response_error is not None]
    shown = largest(fitted)
    responses = bar_chart(
        "responses",
        "Response error of each site",
        "A bar for each site fitted to data: the share of its output's variance that is lost.",
        [_bar(s, s.response_error if s.held_out_error is None else s.held_out_error, response_error(s)) for s in shown],
        "% of the output's variance lost",
    )
    response_table = Table(
        caption=of_all(shown, fitted, "Response errors on calibration data"),
        columns=("site", "#rank", "#response error", "#in-sample"),
        rows=[(s.name, str(s.rank), response_error(s), in_sample_error(s)) for s in shown],
    ).without_empty(("#in-sample",))
    compared = [s for s in sites if s.spectral_error is not None]
    shown = largest(compared)
    spectral = bar_chart(
        "spectral",
        "Spectral error of each weight",
        "A bar for each split weight: the spectral norm of its error in percent of its spectral norm.",
        [_bar(s, s.spectral_error, f"{_percent(s.spectral_error)}, normalized {normalized_error(s)}") for s in shown],
        "% of the weight's spectral norm",
    )
    spectral_table = Table(
        caption=of_all(shown, compared, "Errors of the factors against their weights"),
        columns=("site", "#rank", "#spectral", "#Frobenius", "#normalized"),
        rows=[
            (s.name, str(s.rank), _percent(s.spectral_error), _percent(s.frobenius_error), normalized_error(s))
            for s in shown
        ],
    )
    blocks = [
        *block_of(response_table, responses, words=[RESPONSE]),
        *block_of(spectral_table, spectral, words=[NORMALIZED]),
    ]
    return Section(name="errors", title="Errors of each site", blocks=blocks)


def _bar(site: SiteRecord, error: float | None, note: str) -> Bar:
    return Bar(label=site.name, value=100 * (error or 0), note=f"{site.name}: {note}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
