"""Compression of a torch module in place: replace its dense layers by low-rank ones.

    compress_(module, rank)                         factors of the weights alone
    compress_(module, keep_macs=0.5, calib=data)    factors fitted to calibration data (`fitted_compression`)

The result is an ordinary trainable module. Under a budget, layers may also make fewer hidden units (`module_units`).
Without calibration data, its factors are those of exporting the dense model and splitting it in ONNX, because they
depend only on the weight, the name and the seed of a site. Right factors that several layers share exist in ONNX only
(`joint=False` turns them off), and so do fewer numbers for each attention head.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.sites import SiteRecord, dense_record
from rsi_deploy.linalg.batched_solver import FactorizationRequest, gains_from_batching, solve_in_batches
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Method, PowerIterations, Route, Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.error_rank import smallest_rank
from rsi_deploy.planning.planner import Filters, MaxError, Planner, RankSpec, rank_spec
from rsi_deploy.planning.site_fits import Progress
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.torch_models.computed_weights import fold_computed_
from rsi_deploy.torch_models.fitted_compression import Batches, compress_fitted_
from rsi_deploy.torch_models.fold_batch_norm import batch_norms_behind_convs, fold_batch_norm_
from rsi_deploy.torch_models.module_sites import ModuleSite, find_module_sites, replace_site_, whole_module_error


def compress_(
    module: nn.Module,
    rank: str | int | RankSpec | None = None,
    *,
    max_error: str | MaxError | None = None,
    keep_params: str | float | None = None,
    keep_macs: str | float | None = None,
    calib: Batches | Sequence[tuple[torch.Tensor, ...]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_rank: int = 1,
    rank_multiple: int = 1,
    method: Method = "rsi",
    power_iterations: PowerIterations = 4,
    oversampling: int = 0,
    seed: int = 0,
    route: Route = "auto",
    mixed_precision: bool = True,
    always_split: bool = False,
    progress: Progress | None = None,
) -> list[SiteRecord]:
    """Replace `module`'s layers by low-rank ones, in place.

    A weight that is computed (weight_norm, spectral_norm, pruning) is factorized as its value in evaluation mode. Its
    computation is removed together with the layer; without `calib` it stays if the layer stays dense. Every layer gets
    its own factors: right factors that several layers share (`export(..., joint=True)`) exist in ONNX only.

    With a rank, every layer has its usual form. A budget chooses among all forms but "heads": the pivoted one too, and
    hidden units, which make several layers smaller and keep their types. Units are found by exporting the module with
    samples of the first batch; a module that cannot be exported, or whose code has a fixed number of units, keeps them.

    Args:
        module: any torch module. In evaluation mode, BatchNorms behind convolutions are folded; `calib` requires it.
        rank: a rank (`64`) or the ratio of the paper (`"40%"`), see `RankSpec.parse`.
        max_error: "5%" (of the weight's norm) or "1.1x" (times the best error of that rank), see `MaxError`: every site
            gets the smallest rank that meets it. Excludes `calib`.
        keep_params: share of the module's parameters to keep; requires `calib`.
        keep_macs: share of the multiply-accumulates of all linear and convolutional layers to keep, including layers
            that the filters leave dense; requires `calib`. Refused if another layer has weights, for example an LSTM.
        calib: calibration data: one tuple of positional arguments per call, or a function that returns a fresh iterator
            over them. They should be shuffled if they are sorted by class. None to use the weights alone.
        include: globs on site names (the name of the weight without `.weight`); empty for all.
        exclude: globs on names of sites that stay dense.
        min_rank: smallest rank under `keep_params` or `keep_macs`.
        rank_multiple: number that divides every rank under `keep_params` or `keep_macs`.
        method: "rsi", or one of the baselines "rsvd" and "svd".
        power_iterations: the paper's q for "rsi"; "auto" iterates until another pass would gain less than 1 %.
        oversampling: extra sketch columns.
        seed: random seed for sketches, and for the choice of rows from `calib`.
        route: route of the kernel, see `rsi_deploy.linalg.solver.Solver`; "auto" for the fastest one.
        mixed_precision: iterate in bfloat16 where that is faster and accurate enough.
        always_split: split even if nothing is saved. Requires a rank, excludes `calib`.
        progress: function that is called with the name, index and number of sites before each factorization.

    Returns:
        One record per site in the order of the module tree, with the response errors of fitted sites. The layer that
        reads fewer hidden units is split in the form "units"; those that make them are "smaller".

    Raises:
        UsageError: arguments that contradict each other or do not fit the module, or a module that is itself the layer
            to replace.
        ModelError: NaN or infinite values in a weight or an activation (the message names the site), or a budget that
            no plan can meet.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        >>> records = compress_(net, keep_params=0.8, calib=[(torch.randn(256, 64),)])
        >>> len(records), any(record.decision == "split" for record in records)
        (2, True)
    """
    given = {"rank": rank, "max_error": max_error, "keep_params": keep_params, "keep_macs": keep_macs}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        came = " and ".join(names) or "none"
        raise UsageError(
            f"give exactly one of rank, max_error, keep_params and keep_macs, but got {came}; "
            f"type for example rank='25%'"
        )
    if always_split and (rank is None or calib is not None):
        raise UsageError("always_split goes with a rank and without calib; leave it out")
    solver = Solver(
        method=method,
        power_iterations=power_iterations,
        oversampling=oversampling,
        seed=seed,
        route=route,
        mixed_precision=mixed_precision,
    )
    filters = Filters(include=tuple(include), exclude=tuple(exclude))
    if calib is not None:
        if max_error is not None:
            raise UsageError("max_error judges factors of the weights alone; leave calib out")
        limit = RankSpec.parse(rank) if rank is not None else Budget.parse(keep_params=keep_params, keep_macs=keep_macs)
        calibration = Calibration(solver=solver, min_rank=min_rank, rank_multiple=rank_multiple)
        return compress_fitted_(module, calib, limit, filters, calibration, progress)
    if keep_params is not None or keep_macs is not None:
        raise UsageError(f"{names[0]} is planned on calibration data; add calib=[(inputs,), ...]")
    planner = Planner(
        spec=rank_spec(rank, max_error), include=filters.include, exclude=filters.exclude, always_split=always_split
    )
    return _compress_weights_(module, planner, solver, progress)


def _compress_weights_(
    module: nn.Module, planner: Planner, solver: Solver, progress: Progress | None
) -> list[SiteRecord]:
    """Replace layers by low-rank ones, with factors of the weights alone."""
    sites = find_module_sites(module)
    planner.check([(site.name, *site.shape) for site in sites if not site.obstacle])
    norms = {} if module.training else batch_norms_behind_convs(module)
    if isinstance(planner.spec, MaxError):
        included = [not site.obstacle and not planner.filters.refusal(site.name) for site in sites]
        sites = [_folded(module, s, norms) if fold else s for s, fold in zip(sites, included, strict=True)]
        norms = {}
        planner = _with_ranks(planner, sites, solver)
    decisions = [planner.decide(site.name, *site.shape) for site in sites]
    split = [d.rank is not None and not s.obstacle for s, d in zip(sites, decisions, strict=True)]
    if any("" in site.paths and chosen for site, chosen in zip(sites, split, strict=True)):
        raise whole_module_error(module)
    sites = [_folded(module, s, norms) if chosen else s for s, chosen in zip(sites, split, strict=True)]
    batched = solve_in_batches(
        solver,
        {
            site.name: FactorizationRequest(site.matrix()[0], decision.rank)
            for site, decision, chosen in zip(sites, decisions, split, strict=True)
            if chosen and decision.rank is not None and site.groups == 1 and gains_from_batching(site.shape)
        },
    )
    records = []
    for index, (site, decision) in enumerate(zip(sites, decisions, strict=True)):
        if site.obstacle or decision.rank is None:
            reason = site.obstacle or decision.reason
            records.append(
                dense_record(site.name, site.kind, *site.shape, reason, groups=site.groups, nodes=site.paths)
            )
            continue
        if progress:
            progress(site.name, index, len(sites))
        factors, record = factorize_site(
            site.matrix(),
            decision.rank,
            batched,
            name=site.name,
            kind=site.kind,
            reason=decision.reason,
            nodes=site.paths,
        )
        no_change = torch.zeros(site.groups, site.shape[0])
        replace_site_(module, site, Replacement(site.forms[0], factors.left, factors.right, no_change))
        records.append(record)
    return records


def _with_ranks(planner: Planner, sites: Sequence[ModuleSite], solver: Solver) -> Planner:
    """Return the planner with the smallest rank of every site that meets its error bound."""
    assert isinstance(planner.spec, MaxError)
    ranks: dict[str, int | None] = {}
    for site in sites:
        if not site.obstacle and not planner.filters.refusal(site.name):
            try:
                ranks[site.name] = smallest_rank(site.matrix(), planner.spec, solver, site=site.name)
            except ValueError as error:
                raise ModelError(f"{error} (exclude {site.name!r} to leave it dense)") from error
    return dataclasses.replace(planner, ranks=ranks)


def _folded(module: nn.Module, site: ModuleSite, norms: dict[str, str]) -> ModuleSite:
    """Fold the BatchNorm behind a site into its weight, if there is one, and return the site."""
    if len(site.paths) != 1 or site.paths[0] not in norms:
        return site
    path, norm_path = site.paths[0], norms[site.paths[0]]
    conv, norm = module.get_submodule(path), module.get_submodule(norm_path)
    assert isinstance(conv, nn.modules.conv._ConvNd)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_mean is None or norm.training:
        return site
    fold_computed_(conv)
    fold_batch_norm_(conv, norm)
    module.set_submodule(norm_path, nn.Identity())
    weight = conv.weight
    assert isinstance(weight, nn.Parameter)
    return ModuleSite(weight=site.weight, kind=site.kind, parameter=weight, paths=site.paths, groups=site.groups)
