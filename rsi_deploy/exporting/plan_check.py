"""Compare a plan with what the check part shows, find the sites at fault, and refuse a budget that breaks the model.

    foreseen   sum of the losses of the chosen options: what each split alone does to the outputs
    shown      the same measure of the whole model on the check part: relative output distance + KL divergence

Where far more is shown than foreseen, splits are given back one after another, the most suspicious first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnx import ModelProto

from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import PartOutputs, dense_outputs, output_quality
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.planner import Decision, FixedPlanner

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
GIVEN_BACK = "given back: its split costs more on the check part than the plan counted with"

Candidate = Callable[[Planned], AbstractContextManager[tuple[Path, SplitModel]]]


@dataclass(kw_only=True)
class OutputCheck:
    """The outputs of candidate models on the check part.

    Attributes:
        dense: the dense model's file.
        proto: the dense model, parsed.
        data: calibration data.
        provider: onnxruntime provider.
        candidate: function that writes a model to be judged, and deletes it.
        outputs: part -> outputs of the dense model; more are added.
    """

    dense: Path
    proto: ModelProto
    data: CalibrationData
    provider: str
    candidate: Candidate
    outputs: dict[str, PartOutputs] = field(default_factory=dict)

    @property
    def is_possible(self) -> bool:
        """Return whether the check part is large enough for a verdict."""
        return self.data.check is not None and self.data.needed is None

    def quality(self, made: Planned) -> OutputQuality | None:
        """Return the quality of a model's outputs; None if they are not finite."""
        part = self.data.check
        assert part is not None
        if "check" not in self.outputs:
            self.outputs["check"] = dense_outputs(self.dense, part, self.provider, self.proto)
        with self.candidate(made) as (path, _):
            try:
                return output_quality(self.outputs["check"], path, part, self.provider)
            except GateError:
                return None

    def loss(self, made: Planned) -> float:
        """Return the loss of a model; infinite where its outputs are not finite."""
        return loss_shown(self.quality(made))


def loss_shown(quality: OutputQuality | None) -> float:
    """Return the relative output distance plus the KL divergence, as planning sums it; infinite without numbers."""
    if quality is None:
        return math.inf
    return (quality.output_error or 0.0) + (quality.divergence or 0.0)


def chosen_options(decisions: Decisions, options: Sequence[SiteOptions]) -> dict[str, Option]:
    """Return the option of every split of these decisions."""
    found = {}
    for site in options:
        decision = decisions[site.name]
        if decision.rank is not None:
            known = {(option.form, option.rank): option for option in site.options[1:]}
            found[site.name] = known[decision.form, decision.rank]
    return found


def foreseen_loss(decisions: Decisions, options: Sequence[SiteOptions]) -> float:
    """Return the sum of the losses of the chosen options."""
    return sum(option.loss for option in chosen_options(decisions, options).values())


def is_much_worse(shown: float, foreseen: float) -> bool:
    """Return whether the check part shows much more loss than was foreseen."""
    return shown > FLOOR and shown > FACTOR * foreseen


def at_fault(made: Planned, decisions: Decisions, options: Sequence[SiteOptions], check: OutputCheck) -> list[str]:
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
    return [SiteOptions(name=s.name, options=s.options[:1]) if s.name in names else s for s in options]
