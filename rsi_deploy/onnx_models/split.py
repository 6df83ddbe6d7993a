"""Split the sites of an ONNX graph: decide and factorize each weight once, in one loop, and write the model.

    survey --> SitePlanner.decide --> executor: RSI --> graph_passes.Splitter --> one record a weight, model file

Weights are read one at a time from the model's memory or memory map, those of a group that may share a right factor
together, and are not kept. Above `onnx_file.INLINE_LIMIT` bytes of weights the factors are written as they come: peak
memory is set by the largest weight (or group) and not by the model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch

import graph_passes as gp
from graph_passes.forms import FOLDED
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord, site_name
from rsi_deploy.execution.executor import Executor, LocalExecutor, Task
from rsi_deploy.io import onnx_file
from rsi_deploy.io.external_data import DataFile
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.site_factorizer import SiteFactorizer, weight_key
from rsi_deploy.onnx_models.site_records import records_by_weight, with_fewer_units
from rsi_deploy.planning.error_rank import smallest_rank
from rsi_deploy.planning.planner import MaxError, Planner, SitePlanner

Progress = Callable[[str, int, int], None]
CPU = torch.device("cpu")
LOCAL = LocalExecutor()


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """The result of `split_model`.

    Attributes:
        sites: a record for every weight, in graph order.
        nodes: a record for every node that holds a weight, in graph order.
        kept: weight name -> factors that the caller wanted to see.
        params: numbers in the model's initializers.
        biased: whether splits change biases, as fitted ones do.
    """

    sites: tuple[SiteRecord, ...]
    nodes: tuple[gp.Record, ...]
    kept: Mapping[str, gp.SplitFactors]
    params: int
    biased: bool


def split_model(
    model: ir.Model,
    planner: SitePlanner,
    solver: Solver,
    *,
    path: Path | None = None,
    data_name: str = "",
    metadata: Mapping[str, str] | None = None,
    fitted: Mapping[str, FittedSite] | None = None,
    joint: bool = True,
    progress: Progress | None = None,
    keep: Iterable[str] = (),
    device: torch.device = CPU,
    executor: Executor = LOCAL,
) -> SplitModel:
    """Split `model` in place as the planner decides, and write it.

    Args:
        model: the dense graph, BatchNorms folded; its weights may lie on disk.
        planner: decides each site by its name and shape.
        solver: computes factors.
        path: file to write; None writes none.
        data_name: name of the data file beside `path` for large models; "" is the name of `path` with ".data".
        metadata: entries to add to the model's metadata.
        fitted: site name -> factors fitted to calibration data, for sites that the planner splits. With any, no split
            is joint.
        joint: let sites that multiply the same input share one right factor where that costs less for the same errors
            (see `rsi_deploy.planning.shared_right`); never with the planner's `always_split`.
        progress: called with (site, index, count) before each factorization.
        keep: names of weights whose factors the result holds.
        device: where factors are computed.
        executor: computes them.

    Raises:
        UsageError: filters or ranks that do not fit this model.
        ModelError: a weight holds NaN or infinite values; names the site.
    """
    is_large = path is not None and onnx_file.weight_bytes(model) > onnx_file.INLINE_LIMIT
    data = DataFile(path.with_name(data_name or f"{path.name}.data")) if path is not None and is_large else None
    joint = joint and not planner.always_split and not fitted
    with data or nullcontext(), gp.paused_collector():
        splitter = gp.split_by_site(model, keep=data.append if data else gp.in_memory, joint=joint)
        found = splitter.found()
        sites = [entry for entry in found if isinstance(entry, gp.Site)]
        planner.check([(site_name(s.weight), s.out_features, s.in_features) for s in sites])
        factorizer = SiteFactorizer(
            planner=_with_ranks(planner, sites, solver, device, executor),
            solver=solver,
            executor=executor,
            fitted=fitted or {},
            progress=progress,
            keep=frozenset(keep),
            device=device,
            order=list(dict.fromkeys(s.weight for s in sites)),
            groups=_unshared(splitter.groups(), found),
        )
        executor.announce(factorizer.tasks(sites))
        units = {site.weight: site.units for site in sites if site.units is not None}
        del found, sites  # a site holds its dense weight; from here on each is freed as soon as it is split
        for site in splitter:
            if (task := factorizer.started(site)) is None:
                splitter.answer(factorizer.without_task(site))
            else:
                splitter.answer(factorizer.finished(site, executor.result(task)))
                executor.release(*task.weights)
            del site, task
        if any(isinstance(record, gp.Split) and record.form in {"pivoted", *FOLDED} for record in splitter.records):
            gp.fold_splits(model, **({"replace": data.replace} if data else {}))
        if data:
            data.store_initializers_(model)
    result = SplitModel(
        sites=tuple(with_fewer_units(records_by_weight(splitter.records, factorizer.records), splitter.records, units)),
        nodes=tuple(splitter.records),
        kept=factorizer.kept,
        params=gp.count_parameters(model),
        biased=bool(fitted),
    )
    model.metadata_props.update(metadata or {})
    if path is not None:
        (onnx_file.save_model if data else onnx_file.write_onnx)(model, path)
    return result


def joint_groups(model: ir.Model) -> list[tuple[gp.Site, ...]]:
    """Return the groups of sites that multiply the same input and might share one right factor."""
    splitter = gp.split_by_site(model, joint=True)
    return list(_unshared(splitter.groups(), splitter.found()).values())


def _unshared(
    groups: Iterable[tuple[gp.Site, ...]], found: Iterable[gp.Site | gp.Skip]
) -> dict[tuple[str, ...], tuple[gp.Site, ...]]:
    """The groups, by their weights' names, in which no other node uses any member's weight."""
    uses = Counter(entry.weight for entry in found)
    return {
        tuple(member.weight for member in members): members
        for members in groups
        if all(uses[member.weight] == 1 for member in members)
    }


def _with_ranks(
    planner: SitePlanner, sites: Sequence[gp.Site], solver: Solver, device: torch.device, executor: Executor
) -> SitePlanner:
    """The planner, with the rank of every site where the ranks follow from an error."""
    if not isinstance(planner, Planner) or not isinstance(planner.spec, MaxError):
        return planner
    first = {site_name(site.weight): site for site in reversed(sites)}
    names = [name for name in dict.fromkeys(site_name(s.weight) for s in sites) if not planner.filters.refusal(name)]
    tasks = {name: _rank_task(first[name], planner.spec, solver, device) for name in names}
    executor.announce(iter([*tasks.values()]))
    ranks: dict[str, int | None] = {}
    for name, task in tasks.items():
        try:
            ranks[name] = executor.result(task)
        except ValueError as error:
            raise ModelError(f"{error} (type --exclude {name!r} to leave it dense)") from error
        if ranks[name] is None:
            executor.release(*task.weights)
    return replace(planner, ranks=ranks)


def _rank_task(site: gp.Site, error: MaxError, solver: Solver, device: torch.device) -> Task:
    return Task(
        compute=smallest_rank,
        weights={weight_key(site, "first"): lambda: as_torch(site.load()).to(device)},
        how={"error": error, "solver": solver, "site": site_name(site.weight)},
    )
