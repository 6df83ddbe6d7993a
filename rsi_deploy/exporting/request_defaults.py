"""Settings that follow from the dense model where the user leaves them open: a limit on quality, and a precision."""

from dataclasses import replace

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.progress import step
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.calibrated.data_checks import fitting_measures
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.planning.quality import KINDS, QualityBudget
from rsi_deploy.planning.request import RankRequest


def with_default_quality(request: RankRequest, dense: DenseModel, provider: str) -> RankRequest:
    """Return a request with the limit on quality that fits the model's outputs, where it needs one.

    Raises:
        UsageError: data that do not fit the model.
        ModelError: the model cannot be run on this machine.
    """
    if not request.needs_quality:
        return request
    if dense.outputs is None:
        raise ModelError("the model cannot be run on this machine, so nothing can be planned on --calib; add --rank")
    measure = fitting_measures(request, dense, provider)[0]
    quality = QualityBudget.default(measure)
    with step(f"no size is set: {quality}, the default for {KINDS[measure]}"):
        return replace(request, quality=quality, is_default=True)


def default_settings(request: RankRequest, config: ExportConfig, dense: DenseModel) -> dict[str, str]:
    """Return the settings that a default quality adds to those of the user, and the precision `auto`.

    The precision is `auto` where a quality, a size in bytes or a time decides and no setting needs a float model.
    """
    changed = dict[str, str]()
    quality, budget, plan = request.quality, request.budget, request.plan
    if request.is_default and quality is not None:
        changed[quality.setting] = quality.text(quality.limit)
    of_costs = budget is not None and budget.cost in ("bytes", "nanoseconds")
    has_bits = of_costs or (plan is not None and plan.has_bits)
    can_run = dense.outputs is not None and not dense.quantized
    needs_float = config.ray is not None or config.cost is not None or not request.is_fitted
    if config.precision is None and can_run and (has_bits or quality is not None) and not needs_float:
        changed["precision"] = "auto"
    return changed
