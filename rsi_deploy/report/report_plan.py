"""The plan of a report."""

from rsi_deploy.planning.plan_file import Plan, PlannedSite
from rsi_deploy.precision.schemes import FLOAT32, WEIGHTS4
from rsi_deploy.report.schema import Report

ONE_WAY = (FLOAT32.name, WEIGHTS4.name)
"""Schemes that no plan needs: the model as it is, and one that onnxruntime's own tool decides alone."""


def plan_of(report: Report) -> Plan:
    """Return form, rank and bits of every site as a plan, which can be edited and used for another export.

    Only sites that stay as they are have a reason: another one would be wrong after an edit.
    """
    record = report.precision
    bits, repairs = ({}, {}) if record is None else (record.bits, record.repairs)
    sites = {
        site.name: PlannedSite.model_validate(
            {
                "form": site.form or "dense",
                "rank": site.rank,
                "bits": None if bits.get(site.name) == 32 else bits.get(site.name),
                "repair": repairs.get(site.name),
                "products": "float32" if record is not None and site.name in record.in_float else None,
                "reason": "" if site.outcome != "dense" or bits.get(site.name, 32) < 32 else site.reason,
            }
        )
        for site in report.sites
        if site.rank is None or site.form is not None
    }
    return Plan.model_validate(
        {
            "tool": report.tool,
            "source_hash": report.source.hash,
            "sites": sites,
            "scheme": None if record is None or record.scheme in ONE_WAY else record.scheme,
            "tables": {} if record is None else {name: n for name, n in record.tables.items() if n < 32},
        }
    )
