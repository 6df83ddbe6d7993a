"""Compression with calibration data: low-rank layers fitted to the activations of a module, in place.

    fold BatchNorms --> TorchActivations(module, data) --> ranks or a budget --> fitted factors --> low-rank layers
                        hidden units, for a budget                                                  smaller layers

The planner, factors and forms are those of `export`; hooks take the place of the ONNX graph. Use it for fine-tuning in
PyTorch, or for modules that cannot be exported.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from graph_passes.forms import break_even_rank, split_numbers
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import SiteRecord, dense_record, smaller_record
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import decide_by_budget, decide_uniformly, planned_splits, refuse_uncounted
from rsi_deploy.planning.planner import Decision, Filters, Planner, RankSpec
from rsi_deploy.planning.site_fits import Progress
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.torch_models.calibration.activations import NEVER, TorchActivations
from rsi_deploy.torch_models.calibration.runs import part
from rsi_deploy.torch_models.computed_weights import fold_computed_
from rsi_deploy.torch_models.fold_batch_norm import fold_batch_norms_
from rsi_deploy.torch_models.module_sites import ModuleSite, find_module_sites, replace_site_
from rsi_deploy.torch_models.module_units import ModuleUnits, find_module_units, keep_units_

Batches = Callable[[], Iterator[tuple[Tensor, ...]]]


def compress_fitted_(
    module: nn.Module,
    calib: Batches | Sequence[tuple[Tensor, ...]],
    limit: RankSpec | Budget,
    filters: Filters,
    calibration: Calibration,
    progress: Progress | None,
) -> list[SiteRecord]:
    """Replace layers by low-rank ones that are fitted to calibration data; see `compress_`.

    Args:
        module: module in evaluation mode.
        calib: calibration data.
        limit: rank of every site, or budget of the module.
        filters: sites that may be split.
        calibration: settings of the fit.
        progress: function that is called with the name, index and number of sites.
    """
    for layer in module.modules():
        fold_computed_(layer)
    fold_batch_norms_(module)
    sites = find_module_sites(module)
    filters.check([site.name for site in sites])
    batches, seed = _batches(calib), calibration.solver.seed
    units: Mapping[str, ModuleUnits] = {}

    def included(name: str) -> bool:
        return not filters.refusal(name)

    if isinstance(limit, RankSpec):
        activations = TorchActivations(module, batches, may_split=included, seed=seed)
        planner = Planner(spec=limit, include=filters.include, exclude=filters.exclude)
        decisions = decide_uniformly(planner, activations)
    else:
        # A budget of MACs includes the layers that the filters exclude.
        whole = TorchActivations(module, batches, seed=seed)
        size = _size(module, whole, limit)
        if "units" in calibration.forms:
            macs = {site.name: site.macs for site in whole.sites}
            units = find_module_units(module, part(whole.first, 2), macs)
        activations = TorchActivations(module, batches, may_split=included, seed=seed, units=units)
        decisions = decide_by_budget(limit, calibration.options(activations, progress), size, activations)
    fitted = calibration.fit(activations, planned_splits(decisions, activations), progress)
    records = {site.name: _replace_(module, site, fitted, decisions, calibration, filters, units) for site in sites}
    for name, record in records.items():
        if record.form == "units" and record.rank is not None:
            read = units[name].units
            for other in read.nodes:
                kept = record.rank // read.run
                records[other] = smaller_record(records[other], kept, read.count, "hidden units", name)
    return list(records.values())


def _size(module: nn.Module, whole: TorchActivations, budget: Budget) -> Size:
    """Return the size of the module.

    Raises:
        ModelError: a budget of MACs, and layers with unknown MACs.
    """
    weights = list(module.parameters())
    size = Size(
        bytes=sum(weight.nbytes for weight in weights),
        params=sum(weight.numel() for weight in weights),
        macs=sum(site.macs for site in whole.sites),
    )
    unknown = {name: why for name, why in whole.unreachable.items() if not why.startswith(NEVER)}
    refuse_uncounted(budget, size, ", ".join(f"{name} ({why})" for name, why in unknown.items()))
    return size


def _replace_(
    module: nn.Module,
    site: ModuleSite,
    fitted: dict[str, FittedSite],
    decisions: dict[str, Decision],
    calibration: Calibration,
    filters: Filters,
    units: Mapping[str, ModuleUnits],
) -> SiteRecord:
    """Replace the layers of a fitted site, and return the record of the site."""
    fit, decision = fitted.get(site.name), decisions.get(site.name)
    out, in_ = site.shape
    record = dense_record(site.name, site.kind, out, in_, "", groups=site.groups, nodes=site.paths)
    if fit is None:
        known = site.obstacle or calibration.declined.get(site.name) or filters.refusal(site.name)
        return record.model_copy(update={"reason": known or (decision.reason if decision else "not calibrated")})
    if fit.replacement.form == "units":
        keep_units_(module, units[site.name], fit.replacement)
    else:
        replace_site_(module, site, fit.replacement)
    form, left, right, _ = fit.replacement
    _, rows, rank = left.shape
    return record.model_copy(
        update={
            "decision": "split",
            "reason": decision.reason if decision else "split",
            "rank": rank,
            "form": form,
            "params_compressed": site.groups * split_numbers(form, rows, right.shape[-1], rank),
            "break_even_rank": break_even_rank(form, rows, right.shape[-1]),
            "response_error": fit.response_error,
            "held_out_error": fit.held_out_error,
            "seconds": fit.seconds,
        }
    )


def _batches(calib: Batches | Sequence[tuple[Tensor, ...]]) -> Batches:
    if callable(calib):
        return calib
    if not calib:
        raise UsageError("calib holds no batches; type for example calib=[(inputs,), ...]")
    return lambda: iter(calib)
