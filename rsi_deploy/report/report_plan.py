"""The plan that a report holds."""

from typing import cast

from rsi_deploy.planning.plan_file import Plan, PlannedForm, PlannedSite
from rsi_deploy.report.schema import Report


def plan_of(report: Report) -> Plan:
    """What became of every site, as a plan that can be written, edited and asked for again.

    Only dense sites bring their reason: that of a split would go stale with the first edit.
    """
    sites = {
        site.name: PlannedSite(
            form=cast(PlannedForm, site.form or "dense"), rank=site.rank, reason="" if site.rank else site.reason
        )
        for site in report.sites
        if site.rank is None or site.form is not None
    }
    return Plan(tool=report.tool, source_hash=report.source.hash, sites=sites)
