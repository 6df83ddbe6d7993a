"""Compare a plan with what the check part shows, find the sites at fault, and refuse a budget that breaks the model.

    foreseen   sum of the losses of the chosen options: what each split alone does to the outputs
    shown      the same measure of the whole model on the check part: relative output distance + KL divergence

Where far more is shown than foreseen, splits are given back one after another, the most suspicious first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.exporting.calibrated.candidates import Candidates, loss_shown
from rsi_deploy.exporting.calibrated.planner import CalibratedPlanner
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.planner import Decision, FixedPlanner
from rsi_deploy.planning.record import PlanRecord

FACTOR = 3.0
"""Times by which the loss shown may exceed the one foreseen. The nets cnn_cifar10 and mlp_mnist of the benches show 0.4
to 0.8 times what was foreseen."""
FLOOR = 0.02
"""Loss shown below which nothing is given back. Small sums say little: ResNet-20 showed 29 times what was foreseen at a
loss of 0.001."""
SUSPECTS = 8
"""Most sites that are given back on trial."""
HELP = 0.1
"""Share of the loss shown that a site's return has to save."""
NEAREST_STEPS = 4
"""Most models that are fitted to find the nearest budget that holds up."""
GIVEN_BACK = "given back: its split costs more on the check part than the plan counted with"


def checked_model(budget: Budget, planner: CalibratedPlanner, *, allow_broken: bool) -> tuple[Planned, PlanRecord]:
    """Return the model within a budget, and how the check part compares with what its plan foresaw.

    Raises:
        ModelError: no plan can meet the budget.
        GateError: the model is broken on the check part, and `allow_broken` is false; names the nearest budget that
            holds up.
    """
    check = planner.candidates
    decisions = planner.within(budget)
    made, foreseen = planner.fit(decisions), foreseen_loss(decisions, planner.options)
    if not check.can_be_judged:
        return made, PlanRecord(foreseen=foreseen)
    quality = check.quality(made)
    shown, given_back = loss_shown(quality), tuple[str, ...]()
    if is_much_worse(shown, foreseen):
        faulty = at_fault(made, decisions, planner.options, check)
        if again := _decided_without(faulty, budget, planner):
            names, others = again
            other = planner.fit(others)
            if (less := loss_shown(better := check.quality(other))) < shown:
                made, quality, shown, given_back = other, better, less, names
                foreseen = foreseen_loss(others, planner.options)
    if (quality is None or quality.is_broken) and not allow_broken:
        kept = "gives NaN or infinite outputs" if quality is None else f"keeps {_kept(quality)}"
        nearest = _nearest(budget, planner)
        advice = f"; type {nearest}, the nearest that was found to hold up"
        if nearest is None:
            advice = ", and no larger budget that was tried holds up; leave sites dense (--exclude), give more samples"
        raise GateError(
            f"{budget}: the compressed model is broken: it {kept} on the check part{advice}, or add --allow-broken"
        )
    return made, PlanRecord(foreseen=foreseen, shown=shown if math.isfinite(shown) else None, given_back=given_back)


def chosen_options(decisions: Decisions, options: Sequence[SiteOptions]) -> dict[str, Option]:
    """Return the option of every site that these decisions change."""
    found = {}
    for site in options:
        decision = decisions[site.name]
        if decision.rank is not None or decision.bits < 32:
            known = {(option.form, option.rank, option.bits, option.repair): option for option in site.options[1:]}
            form = "dense" if decision.rank is None else decision.form
            found[site.name] = known[form, decision.rank, decision.bits, decision.repair]
    return found


def foreseen_loss(decisions: Decisions, options: Sequence[SiteOptions]) -> float:
    """Return the sum of the losses of the chosen options."""
    return sum(option.loss for option in chosen_options(decisions, options).values())


def is_much_worse(shown: float, foreseen: float) -> bool:
    """Return whether the check part shows much more loss than was foreseen."""
    return shown > FLOOR and shown > FACTOR * foreseen


def at_fault(made: Planned, decisions: Decisions, options: Sequence[SiteOptions], check: Candidates) -> list[str]:
    """Return the sites whose return to dense helps, the most helpful per parameter first.

    Args:
        made: fitted model.
        decisions: its decisions.
        options: options of every site.
        check: judges models.
    """
    chosen = chosen_options(decisions, options)
    dense = {site.name: site.options[0].params for site in options}
    foreseen, shown = foreseen_loss(decisions, options), check.loss(made)
    helps: dict[str, float] = {}
    for name in suspects(made, chosen):
        trial = without(made, decisions, [*helps, name])
        loss = check.loss(trial)
        if loss < (1 - HELP) * shown:
            helps[name] = (shown - loss if math.isfinite(shown) else 1.0) / max(dense[name] - chosen[name].params, 1)
            shown = loss
        if not is_much_worse(shown, foreseen):
            break
    return sorted(helps, key=lambda name: -helps[name])


def suspects(made: Planned, chosen: Mapping[str, Option]) -> list[str]:
    """Return the split sites by falling suspicion: the held-out error of the fit over the error planned with."""

    def suspicion(name: str) -> tuple[float, float]:
        fitted = made.fitted.get(name)
        if fitted is None:
            return 1.0, chosen[name].loss
        held_out = fitted.held_out_error
        found = fitted.response_error if held_out is None else held_out
        return found / max(chosen[name].error, 1e-6), chosen[name].loss

    return sorted(chosen, key=suspicion, reverse=True)[:SUSPECTS]


def without(made: Planned, decisions: Decisions, names: Sequence[str]) -> Planned:
    """Return a fitted model with some of its sites dense; the factors of the others stay."""
    assert isinstance(made.planner, FixedPlanner)
    planner = replace(made.planner, decisions=returned(decisions, names))
    return Planned(planner=planner, fitted={name: f for name, f in made.fitted.items() if name not in names})


def returned(decisions: Decisions, names: Sequence[str]) -> Decisions:
    """Return the decisions with some sites dense."""
    return decisions | dict.fromkeys(names, Decision(rank=None, reason=GIVEN_BACK))


def kept_dense(options: Sequence[SiteOptions], names: Sequence[str]) -> list[SiteOptions]:
    """Return the options without the splits of some sites."""
    return [replace(s, options=s.options[:1]) if s.name in names else s for s in options]


def _decided_without(
    names: Sequence[str], budget: Budget, planner: CalibratedPlanner
) -> tuple[tuple[str, ...], Decisions] | None:
    """Return the most helpful of these sites that can be dense within a budget, and the decisions without them."""
    for count in range(len(names), 0, -1):
        try:
            decisions = replace(planner, options=kept_dense(planner.options, names[:count])).within(budget)
        except ModelError:  # the budget cannot spare these splits
            continue
        return tuple(names[:count]), returned(decisions, names[:count])
    return None


def _nearest(budget: Budget, planner: CalibratedPlanner) -> Budget | None:
    """Return the smallest larger budget that holds up, found by bisection; None if none does that is tried."""
    total = planner.total(budget)
    low, high, nearest = min(budget.total(total) / total, 1.0), 1.0, None
    for _ in range(NEAREST_STEPS):
        share = round((low + high) / 2, 3)
        found = planner.candidates.quality(planner.fit(planner.at(share, budget)))
        if found is None or found.is_broken:
            low = share
        else:
            high, nearest = share, budget.at(share, total)
    return nearest


def _kept(quality: OutputQuality) -> str:
    """Return the first value of a quality in words."""
    if quality.perplexity_ratio is not None:
        return f"{quality.perplexity_ratio:.1f} times the perplexity"
    if quality.agreement is not None:
        return f"{quality.agreement:.1f} % of the answers"
    if quality.cosine is not None:
        return f"a mean cosine of {quality.cosine:.3f}"
    return f"an output error of {100 * (quality.output_error or 0):.0f} %"
