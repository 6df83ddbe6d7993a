"""The plan of a report."""

from typing import cast

from rsi_deploy.planning.plan_file import Plan, PlannedForm, PlannedSite
from rsi_deploy.report.schema import Report


def plan_of(report: Report) -> Plan:
    """Return form and rank of every site as a plan, which can be edited and used for another export.

    Only dense sites have a reason: the reason of a split would be wrong after an edit.
    """
    sites = {
        site.name: PlannedSite(
            form=cast(PlannedForm, site.form or "dense"), rank=site.rank, reason="" if site.rank else site.reason
        )
        for site in report.sites
        if site.rank is None or site.form is not None
    }
    return Plan(tool=report.tool, source_hash=report.source.hash, sites=sites)
