"""A cost table for the terminal: one row a shape, what a split of it saves, and what a reader must know."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from rsi_deploy.costing.cost_table import CostTable, SiteCost

COLUMNS = ("sites", "shape", "dense", "splits shown faster", "largest faster rank", "widest interval")


def print_costs(console: Console, table: CostTable) -> None:
    """The shapes, the whole model, and the notes."""
    shown = Table(*COLUMNS)
    uses = Counter(table.sites.values())
    for cost in table.costs:
        shown.add_row(*_row(cost, uses[cost.signature]))
    console.print(shown)
    model = table.model
    console.print(
        f"the whole dense model: {model.dense_nanoseconds / 1e6:.3g} ms at batch {model.batch}; it saves "
        f"{model.scale:.2f} times what its sites save alone",
        markup=False,
    )
    for check in model.checks:
        console.print(
            f"a plan measured as a whole: {100 * check.measured:.1f} % of the dense time, "
            f"{100 * (1 - model.scale * (1 - check.predicted)):.1f} % foretold",
            markup=False,
        )
    for name, reason in table.untimed.items():
        console.print(f"not timed, stays dense: {name}: {reason}", markup=False)
    for note in table.notes:
        console.print(f"note: {note}", markup=False)


def _row(cost: SiteCost, sites: int) -> list[str]:
    faster = [split for split in cost.splits if cost.is_faster(split.form, split.rank)]
    ranks = {form: max(s.rank for s in faster if s.form == form) for form in dict.fromkeys(s.form for s in faster)}
    width = "too few turns" if cost.half_width is None else f"+-{100 * cost.half_width:.0f} %"
    largest = ", ".join(f"{form} {rank}" for form, rank in ranks.items()) or "none"
    shape = cost.signature.partition(":")[0]
    return [str(sites), shape, _time(cost.dense_nanoseconds), f"{len(faster)} of {len(cost.splits)}", largest, width]


def _time(nanoseconds: int) -> str:
    """With its unit.

    >>> _time(1234), _time(2_500_000)
    ('1.23 us', '2.5 ms')
    """
    return f"{nanoseconds / 1e6:.3g} ms" if nanoseconds >= 1e5 else f"{nanoseconds / 1e3:.3g} us"
