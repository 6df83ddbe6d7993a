"""Results of `export`, `inspect`, `verify` and `doctor` on the terminal."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from rsi_deploy.report.summary import (
    checks_table,
    comparison_table,
    evidence_lines,
    points_table,
    precision_lines,
    probe_inputs,
    quality_table,
    shape,
    site_notes,
    site_table,
    verdict,
)
from rsi_deploy.report.table import Table
from rsi_deploy.report.tables.terminal import print_table

if TYPE_CHECKING:  # a machine that only measures has no torch
    from rsi_deploy.core.sites import SiteRecord
    from rsi_deploy.onnx_models.inspection import Inspection, SiteView
    from rsi_deploy.report.outlook import Outlook
    from rsi_deploy.report.schema import Report
    from rsi_deploy.report.verification import VerifyResult
    from rsi_deploy.runtime.doctor import Diagnosis


MOST_REASONS = 8
"""Largest number of reasons of sites that a terminal lists."""
_RANKS = ("#break-even rank", "#rank 90 %", "#rank 99 %", "#stable rank")


def print_report(console: Console, report: "Report", *, most_sites: int = 30) -> None:
    """Print the sites, the comparison of dense and compressed model, the checks, the notes, and the verdict."""
    print_sites(console, report.sites, most=most_sites, bits=report.bits)
    print_table(console, comparison_table(report))
    print_table(console, quality_table(report))
    print_table(console, points_table(report))
    for line in precision_lines(report):
        console.print(escape(line))
    checks = [f"{name} {error}" for name, _, error, *_ in checks_table(report).rows if error != "not measured"]
    if report.verification.approximation is not None:
        console.print(f"relative errors of the outputs on {probe_inputs(report)}: {', '.join(checks)}")
    for line in evidence_lines(report):
        console.print(escape(line))
    for note in [*report.notes, *(report.latency.notes if report.latency else ())]:
        console.print(f"note: {escape(note)}")
    console.print(f"verdict: {escape(verdict(report))}", style="bold")


def print_sites(
    console: Console, sites: "tuple[SiteRecord, ...]", *, most: int = 30, bits: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Print a row for each site, or a count for each reason if there are more than `most` sites; `bits` as known."""
    split = [s for s in sites if s.rank]
    if len(sites) > most:
        joint = sum(bool(s.joint) for s in split)
        console.print(
            f"{len(split)} of {len(sites)} sites split{f' ({joint} jointly)' * bool(joint)}; report.json and README.md "
            "list all of them"
        )
        reasons = Counter((s.outcome, s.kind_of_reason) for s in sites if not s.rank)
        for (outcome, reason), count in reasons.most_common(MOST_REASONS):
            console.print(f"  {outcome:7s} {count:4d}  {escape(reason)}")
        if len(reasons) > MOST_REASONS:
            others = sum(count for _, count in reasons.most_common()[MOST_REASONS:])
            console.print(f"  others  {others:4d}  for {len(reasons) - MOST_REASONS} other reasons")
        return
    print_table(console, site_table(sites, bits))
    for note in site_notes(sites):
        console.print(note, style="dim")


def print_inspection(console: Console, result: "Inspection") -> None:
    """Print a row for each site: shape, break-even rank, spectrum, and what export would do."""
    table = Table(
        caption="",
        columns=("site", "operation", "#out x in", "#params", *_RANKS, f"export --rank {result.rank}"),
        rows=[
            (
                s.name,
                s.kind,
                shape(s),
                f"{s.params:,}",
                f"{s.break_even_rank:.1f}" if s.out_features else "",
                str(s.rank_90 or ""),
                str(s.rank_99 or ""),
                "" if s.stable_rank is None else f"{s.stable_rank:.1f}",
                _prospect(s),
            )
            for s in result.sites
        ],
    )
    print_table(console, table)
    split = [s for s in result.sites if s.rank]
    before = sum(s.params for s in result.sites)
    after = sum(s.groups * s.rank * (s.out_features + s.in_features) if s.rank else s.params for s in result.sites)
    console.print(
        f"{escape(result.model)}: {len(split)} of {len(result.sites)} sites would be split, "
        f"{before:,} weights -> {after:,}" + (f" ({after / before:.1%} kept)" if before else "")
    )
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def print_outlook(console: Console, outlook: "Outlook") -> None:
    """Print what unseen data keep of every site and of the whole model."""
    from rsi_deploy.report.outlook import point_outlook, site_outlook

    print_table(console, site_outlook(outlook))
    print_table(console, point_outlook(outlook))
    console.print(f"verdict: {escape(outlook.verdict)}.", soft_wrap=True)


def _prospect(site: "SiteView") -> str:
    """Return what export would do at a site."""
    if not site.rank:
        return f"dense: {site.reason}"
    others = [name for name in site.joint if name != site.name]
    return f"rank {site.rank}" + f", or jointly with {', '.join(others)}" * bool(others)


def print_verification(console: Console, result: "VerifyResult") -> None:
    """Print one line for each claim."""
    styles = {"holds": "green", "broken": "bold red", "not checked": "dim"}
    for claim in result.claims:
        console.print(f"[{styles[claim.status]}]{claim.status:>12}[/]  {claim.name:<12} {escape(claim.detail)}")


def print_diagnosis(console: Console, result: "Diagnosis") -> None:
    """Print one line for each finding, with what to type if something is wrong."""
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for finding in result.findings:
        console.print(f"[{styles[finding.level]}]{finding.level:>8}[/]  {escape(finding.what)}")
        if finding.advice:
            console.print(f"          {escape(finding.advice)}")
    console.print(f"providers: {', '.join(result.providers) or 'none'}")
