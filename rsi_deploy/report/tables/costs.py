"""A cost table on the terminal: one row for each shape, and the whole model."""

from collections import Counter

from rich.console import Console
from rich.text import Text

from rsi_deploy.costing.cost_table import CostTable, SiteCost
from rsi_deploy.report.table import Table
from rsi_deploy.report.tables.terminal import print_table

COLUMNS = ("shape", "#sites", "#dense", "#splits shown faster", "largest faster rank", "#widest interval")


def print_costs(console: Console, costs: CostTable) -> None:
    """Print the shapes, the whole model, and the notes."""
    uses = Counter(costs.sites.values())
    print_table(
        console, Table(caption="", columns=COLUMNS, rows=[_row(cost, uses[cost.signature]) for cost in costs.costs])
    )
    model, scheme = costs.model, costs.conditions.scheme
    kind = "" if scheme == "float32" else f" in {scheme}"
    lines = [
        f"the whole dense model{kind}: {model.dense_nanoseconds / 1e6:.3g} ms at batch {model.batch}; splits save "
        f"{model.scale:.2f} times as much in it as in the single sites"
    ]
    lines += [
        f"a plan measured as a whole: {100 * check.measured:.1f} % of the dense time, "
        f"{100 * (1 - model.scale * (1 - check.predicted)):.1f} % predicted"
        for check in model.checks
    ]
    lines += [f"not timed, stays dense: {name}: {reason}" for name, reason in costs.untimed.items()]
    lines += [f"note: {note}" for note in costs.notes]
    for line in lines:
        console.print(Text(line))


def _row(cost: SiteCost, sites: int) -> list[str]:
    faster = [split for split in cost.splits if cost.is_faster(split.form, split.rank)]
    ranks = {form: max(s.rank for s in faster if s.form == form) for form in dict.fromkeys(s.form for s in faster)}
    width = "too few turns" if cost.half_width is None else f"+-{100 * cost.half_width:.0f} %"
    largest = ", ".join(f"{form} {rank}" for form, rank in ranks.items()) or "none"
    shape = cost.signature.partition(":")[0]
    return [shape, str(sites), _time(cost.dense_nanoseconds), f"{len(faster)} of {len(cost.splits)}", largest, width]


def _time(nanoseconds: int) -> str:
    """Return a time with its unit.

    >>> _time(1234), _time(2_500_000)
    ('1.23 us', '2.5 ms')
    """
    return f"{nanoseconds / 1e6:.3g} ms" if nanoseconds >= 1e5 else f"{nanoseconds / 1e3:.3g} us"
