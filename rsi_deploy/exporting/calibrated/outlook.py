"""The outlook of `inspect --calib`: what unseen data keep of every site, and of the whole model at several sizes."""

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import break_even_rank
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.planning.planner import Decision
from rsi_deploy.report.outlook import Outlook, PointOutlook, SiteOutlook

SHARES = (0.9, 0.8, 0.7, 0.5)
"""Shares of the parameters at which the whole model is judged."""


def outlook_of(planner: CalibratedPlanner) -> Outlook:
    """Return the outlook of a model: every site at half of its parameters, the whole model at `SHARES` of them."""
    half = {}
    for site in planner.streams.sites:
        rank = int(break_even_rank(*site.shape(site.forms[0])) / 2)
        if rank:
            half[site.name] = Decision(rank=rank, reason="", form=site.forms[0])
    fitted = planner.fit(half).fitted
    points = []
    for share in SHARES:
        try:
            decisions = planner.in_size(share)
        except ModelError:  # no plan is so small
            continue
        points.append(PointOutlook(share=share, quality=planner.candidates.quality(planner.fit(decisions))))
    sites = tuple(
        SiteOutlook(
            name=name,
            form=site.replacement.form,
            rank=site.replacement.right.shape[-2],
            held_out=site.held_out_error,
            in_sample=site.response_error,
        )
        for name, site in fitted.items()
    )
    data = planner.candidates.data
    assert data.check is not None
    return Outlook(samples=data.samples, check_samples=data.check.samples, sites=sites, points=tuple(points))
