"""What the terminal shows of results."""

from collections import Counter
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rsi_deploy.report.summary import (
    LOSS,
    RESPONSE,
    certificate_lines,
    comparison_rows,
    has_loss,
    normalized_error,
    operation,
    response_error,
    verdict,
)

if TYPE_CHECKING:  # a machine that only measures has no torch
    from rsi_deploy.core.sites import SiteRecord
    from rsi_deploy.onnx_models.inspection import Inspection, SiteView
    from rsi_deploy.report.schema import Report
    from rsi_deploy.report.verification import VerifyResult
    from rsi_deploy.runtime.doctor import Diagnosis


def print_report(console: Console, report: "Report", *, most_sites: int = 30) -> None:
    """The sites, then dense against compressed, then the verdict."""
    print_sites(console, report.sites, most=most_sites)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("", "left"), ("dense", "right"), ("compressed", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in comparison_rows(report):
        table.add_row(*row)
    console.print(table)
    v = report.verification
    if v.approximation is not None:
        gates = [f"exporter {v.exporter.relative_l2:.1e}"] if v.exporter else []
        gates += [f"surgery {v.surgery.relative_l2:.1e}"] if v.surgery else []
        console.print(
            f"verified: {', '.join(gates)}; approximation {v.approximation.relative_l2:.3f} "
            "(relative error of outputs on probe inputs)"
        )
    for line in certificate_lines(report):
        console.print(escape(line))
    for note in [*report.notes, *(report.latency.notes if report.latency else ())]:
        console.print(f"note: {escape(note)}")
    console.print(f"verdict: {escape(verdict(report))}", style="bold")


def print_sites(console: Console, sites: "tuple[SiteRecord, ...]", *, most: int = 30) -> None:
    """One line a site, or a count by reason where there are more than `most`."""
    split = [s for s in sites if s.rank]
    dense = Counter(s.reason for s in sites if not s.rank)
    if len(sites) > most:
        jointly = sum(bool(s.joint) for s in split)
        console.print(
            f"{len(split)} of {len(sites)} sites split{f' ({jointly} jointly)' * bool(jointly)}; every one is in "
            "report.json and README.md"
        )
        for reason, count in dense.most_common(8):
            console.print(f"  dense {count:4d}  {escape(reason)}")
        return
    with_errors, with_responses = (any(shown(site) for site in sites) for shown in (normalized_error, response_error))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("site", overflow="fold")
    table.add_column("op", no_wrap=True)
    for column in ("out x in", "rank", *["error"] * with_errors, *["response"] * with_responses, "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("decision")
    for s in sites:
        groups = f" x{s.groups}" if s.groups > 1 else ""
        table.add_row(
            escape(s.name),
            escape(operation(s)),
            f"{s.out_features} x {s.in_features}{groups}" if s.out_features else "",
            str(s.rank or ""),
            *[normalized_error(s)] * with_errors,
            *[response_error(s)] * with_responses,
            "" if not s.macs_dense or not s.macs_compressed else f"{s.macs_compressed / s.macs_dense:.0%}",
            escape(s.decision if s.rank and s.reason == "split" else f"{s.decision}: {s.reason}"),
        )
    console.print(table)
    if with_errors:
        console.print("error: normalized spectral error, 1.00 is the optimum of this rank", style="dim")
    if with_responses:
        console.print(RESPONSE, style="dim")
    if any(has_loss(s) for s in sites):
        console.print(LOSS, style="dim")
    if any(s.joint for s in sites):
        console.print(
            "jointly: one right factor for several sites; its MACs count at the first, and the optimum is that of the "
            "site alone",
            style="dim",
        )


def print_inspection(console: Console, result: "Inspection") -> None:
    """One line a site: shape, break-even rank, spectrum, and what export would do."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("site", "op"):
        table.add_column(column)
    for column in ("out x in", "params", "break-even", "rank 90 %", "rank 99 %", "stable rank"):
        table.add_column(column, justify="right")
    table.add_column(f"export --rank {result.rank}")
    for s in result.sites:
        groups = f" x{s.groups}" if s.groups > 1 else ""
        table.add_row(
            escape(s.name),
            escape(s.kind),
            f"{s.out_features} x {s.in_features}{groups}" if s.out_features else "",
            f"{s.params:,}",
            f"{s.break_even_rank:.1f}" if s.out_features else "",
            str(s.rank_90 or ""),
            str(s.rank_99 or ""),
            f"{s.stable_rank:.1f}" if s.stable_rank is not None else "",
            escape(_prospect(s)),
        )
    console.print(table)
    split = [s for s in result.sites if s.rank]
    before, after = sum(s.params for s in result.sites), 0
    for s in result.sites:
        after += s.groups * s.rank * (s.out_features + s.in_features) if s.rank else s.params
    console.print(
        f"{escape(result.model)}: {len(split)} of {len(result.sites)} sites would be split, "
        f"{before:,} weights -> {after:,}" + (f" ({after / before:.1%} kept)" if before else "")
    )
    for note in result.notes:
        console.print(f"note: {escape(note)}")


def _prospect(site: "SiteView") -> str:
    """What export would do at a site."""
    if not site.rank:
        return f"dense: {site.reason}"
    others = [name for name in site.joint if name != site.name]
    return f"rank {site.rank}" + f", or jointly with {', '.join(others)}" * bool(others)


def print_verification(console: Console, result: "VerifyResult") -> None:
    """One line a claim."""
    styles = {"holds": "green", "broken": "bold red", "not checked": "dim"}
    for claim in result.claims:
        console.print(f"[{styles[claim.status]}]{claim.status:>12}[/]  {claim.name:<12} {escape(claim.detail)}")


def print_diagnosis(console: Console, result: "Diagnosis") -> None:
    """One line a finding, with what to type where something is wrong."""
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    for finding in result.findings:
        console.print(f"[{styles[finding.level]}]{finding.level:>8}[/]  {escape(finding.what)}")
        if finding.advice:
            console.print(f"          {escape(finding.advice)}")
    console.print(f"providers: {', '.join(result.providers) or 'none'}")
