"""The PyTorch pass with calibration data: low-rank layers fitted to what flows through the module, in place.

    BatchNorms folded --> TorchActivations(module, data) --> ranks or a budget --> fitted factors --> low-rank layers

The same planner, factors and forms as in `export`, by hooks instead of an ONNX graph: for staying in PyTorch, to
fine-tune, or for a module that cannot be exported.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import SiteRecord, dense_record
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import decide_by_budget, decide_uniformly, planned_splits, refuse_uncounted
from rsi_deploy.planning.planner import Decision, Filters, Planner, RankSpec
from rsi_deploy.planning.site_options import Calibration, Progress
from rsi_deploy.torch_models.calibration.activations import NEVER, TorchActivations
from rsi_deploy.torch_models.compress import ModuleSite, find_module_sites, replace_site_
from rsi_deploy.torch_models.computed_weights import fold_computed_
from rsi_deploy.torch_models.fold_batch_norm import fold_batch_norms_

Batches = Callable[[], Iterator[tuple[Tensor, ...]]]


def compress_to_data_(
    module: nn.Module,
    calib: Batches | Sequence[tuple[Tensor, ...]],
    *,
    rank: str | int | RankSpec | None = None,
    keep_params: str | float | None = None,
    keep_macs: str | float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_rank: int = 1,
    rank_multiple: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SiteRecord]:
    """Replace `module`'s layers by low-rank ones fitted to calibration data, in place.

    Args:
        module: in evaluation mode; weights that are computed (weight_norm and the like) and BatchNorms behind
            convolutions are folded first. Works on its own device.
        calib: unlabelled data, the positional arguments of one call each; or what gives a fresh iterator over them.
            Shuffled, where the data are sorted by class.
        rank: a rank (`64`) or a ratio (`"40%"`), the same at every site; or exactly one of the budgets.
        keep_params: share of the module's parameters to keep.
        keep_macs: share of the multiply-accumulates in its linear and convolutional layers, those that `include` and
            `exclude` leave dense among them. Refused where another layer computes with weights: a recurrent one, say.
        include: globs on site names; empty means all.
        exclude: globs on site names that stay dense.
        min_rank: no planned rank below it.
        rank_multiple: planned ranks are multiples of it.
        seed: of the choice of rows.
        progress: called with (site, index, count).

    Returns:
        One record a site, in the module tree's order, with the response error of those that were fitted.

    Raises:
        UsageError: a request that cannot be meant, or data that do not fit the module.
        ModelError: no plan can meet the budget, or NaN in the activations; the site is named.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        >>> records = compress_to_data_(net, [(torch.randn(256, 64),)], keep_params=0.8)
        >>> [record.decision for record in records]
        ['split', 'dense']
    """
    budgets = {"keep_params": keep_params, "keep_macs": keep_macs}
    if (rank is None) == all(budget is None for budget in budgets.values()):
        raise UsageError("give exactly one of rank, keep_params and keep_macs; type for example keep_macs=0.5")
    filters = Filters(include=tuple(include), exclude=tuple(exclude))
    for layer in module.modules():
        fold_computed_(layer)
    fold_batch_norms_(module)
    sites = find_module_sites(module)
    filters.check([site.name for site in sites])
    activations = TorchActivations(module, _batches(calib), wanted=lambda name: not filters.refusal(name), seed=seed)
    calibration = Calibration(solver=Solver(seed=seed), min_rank=min_rank, rank_multiple=rank_multiple)
    if rank is not None:
        planner = Planner(spec=RankSpec.parse(rank), include=filters.include, exclude=filters.exclude)
        decisions = decide_uniformly(planner, activations)
    else:
        budget = Budget.parse(keep_params=keep_params, keep_macs=keep_macs)
        size = _size(module, calib, activations, budget, seed)
        decisions = decide_by_budget(budget, calibration.options(activations, progress), size, activations)
    fitted = calibration.fit(activations, planned_splits(decisions, activations), progress)
    return [_finished(module, site, fitted, decisions, calibration, filters) for site in sites]


def _size(
    module: nn.Module,
    calib: Batches | Sequence[tuple[Tensor, ...]],
    activations: TorchActivations,
    budget: Budget,
    seed: int,
) -> Size:
    """What a budget of the whole module is held against: its MACs are those of all layers, whatever the filters say.

    Raises:
        ModelError: a budget of MACs, and layers whose MACs are not known.
    """
    weights = list(module.parameters())
    whole = TorchActivations(module, _batches(calib), seed=seed) if budget.cost == "macs" else activations
    size = Size(
        bytes=sum(weight.nbytes for weight in weights),
        params=sum(weight.numel() for weight in weights),
        macs=sum(site.macs for site in whole.sites),
    )
    unknown = {name: why for name, why in whole.unreachable.items() if not why.startswith(NEVER)}
    refuse_uncounted(budget, size, ", ".join(f"{name} ({why})" for name, why in unknown.items()))
    return size


def _finished(
    module: nn.Module,
    site: ModuleSite,
    fitted: dict[str, FittedSite],
    decisions: dict[str, Decision],
    calibration: Calibration,
    filters: Filters,
) -> SiteRecord:
    """Put the site's replacement in place, where it has one, and say what was done."""
    fit, decision = fitted.get(site.name), decisions.get(site.name)
    out, in_ = site.shape
    record = dense_record(site.name, site.kind, out, in_, "", groups=site.groups, nodes=site.paths)
    if fit is None:
        known = site.obstacle or calibration.declined.get(site.name) or filters.refusal(site.name)
        return record.model_copy(update={"reason": known or (decision.reason if decision else "not calibrated")})
    replace_site_(module, site, fit.replacement)
    replacement = fit.replacement
    return record.model_copy(
        update={
            "decision": "split",
            "reason": decision.reason if decision else "split",
            "rank": replacement.left.shape[-1],
            "form": replacement.form,
            "params_compressed": replacement.left.numel() + replacement.right.numel(),
            "response_error": fit.response_error,
            "seconds": fit.seconds,
        }
    )


def _batches(calib: Batches | Sequence[tuple[Tensor, ...]]) -> Batches:
    if callable(calib):
        return calib
    if not calib:
        raise UsageError("calib holds no batches; give a sequence of the positional arguments of a call each")
    return lambda: iter(calib)
