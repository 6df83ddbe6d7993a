"""The ONNX way: plan the sites of a graph, factorize each weight once, and have graph_passes split the nodes.

    find_sites --> Planner.decide --> Solver (RSI) --> graph_passes.split --> one record a weight

Weights are read one at a time from the model's memory or memory map, those of a group that may share a right factor
together, and are not kept.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch

import graph_passes as gp
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord, dense_record, site_name
from rsi_deploy.execution.executor import Executor, LocalExecutor, Task
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.factor_source import FactorSource, weight_key
from rsi_deploy.planning.error_rank import smallest_rank
from rsi_deploy.planning.planner import MaxError, Planner, SitePlanner

Progress = Callable[[str, int, int], None]
CPU = torch.device("cpu")
HERE = LocalExecutor()


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """What `split_graph` did: a record for every weight, and for every node."""

    sites: tuple[SiteRecord, ...]
    nodes: tuple[gp.Record, ...]
    kept: dict[str, gp.Factors]


def split_graph(
    model: ir.Model,
    planner: SitePlanner,
    solver: Solver,
    *,
    fitted: Mapping[str, FittedSite] | None = None,
    joint: bool = True,
    progress: Progress | None = None,
    keep: Iterable[str] = (),
    device: torch.device = CPU,
    store: gp.Keep = gp.in_memory,
    executor: Executor = HERE,
) -> SplitModel:
    """Split `model` in place as the planner decides, with factors from the solver.

    Args:
        model: the dense graph; BatchNorms already folded.
        planner: decides each site by its name and shape.
        solver: computes factors.
        fitted: by site name, what calibration has made of a site; it is taken where the planner splits the site. With
            it nothing is joint.
        joint: let sites that multiply the same input share one right factor where that costs less for the same errors
            (see `rsi_deploy.planning.shared_right`); never with the planner's `always_split`.
        progress: called with (site, index, count) before each factorization.
        keep: names of weights whose factors the caller wants to see.
        device: where factors are computed.
        store: where they are kept until the model is written.
        executor: who computes them.

    Raises:
        UsageError: filters or ranks that cannot be meant for this model.
        ModelError: NaN or infinite values in a weight, with the site's name.
    """
    joint = joint and not planner.always_split and not fitted
    found = gp.find_sites(model)
    sites = [entry for entry in found if isinstance(entry, gp.Site)]
    planner.check([(site_name(s.weight), s.out_features, s.in_features) for s in sites])
    planner = _with_ranks(planner, sites, solver, device, executor)
    source = FactorSource(
        planner=planner,
        solver=solver,
        executor=executor,
        fitted=fitted or {},
        progress=progress,
        wanted=frozenset(keep),
        device=device,
        order=list(dict.fromkeys(s.weight for s in sites)),
        groups={tuple(s.weight for s in members): members for members in joint_groups(model)} if joint else {},
    )
    executor.ahead(source.ahead(sites))
    del found, sites  # a site holds its dense weight; from here on each is let go as soon as it is split
    nodes = gp.split(model, source, keep=store, joint=joint)
    return SplitModel(sites=tuple(_by_weight(nodes, source.records)), nodes=tuple(nodes), kept=source.kept)


def _with_ranks(
    planner: SitePlanner, sites: Sequence[gp.Site], solver: Solver, device: torch.device, executor: Executor
) -> SitePlanner:
    """The planner with the rank of every site, where they follow from an error."""
    if not isinstance(planner, Planner) or not isinstance(planner.spec, MaxError):
        return planner
    first = {site_name(site.weight): site for site in reversed(sites)}
    names = [name for name in dict.fromkeys(site_name(s.weight) for s in sites) if not planner.filters.refusal(name)]
    calls = {name: _rank_call(first[name], planner.spec, solver, device) for name in names}
    executor.ahead(iter([*calls.values()]))
    ranks: dict[str, int | None] = {}
    for name, call in calls.items():
        try:
            ranks[name] = executor.made(call)
        except ValueError as error:
            raise ModelError(f"{error} (type --exclude {name!r} to leave it dense)") from error
        if ranks[name] is None:
            executor.done(*call.weights)
    return replace(planner, ranks=ranks)


def _rank_call(site: gp.Site, error: MaxError, solver: Solver, device: torch.device) -> Task:
    return Task(
        compute=smallest_rank,
        weights={weight_key(site, "first"): lambda: as_torch(site.load()).to(device)},
        how={"error": error, "solver": solver, "site": site_name(site.weight)},
    )


def joint_groups(model: ir.Model) -> list[tuple[gp.Site, ...]]:
    """Sites that multiply the same input and might share one right factor: each alone bears its weight."""
    uses = Counter(entry.weight for entry in gp.find_sites(model))
    return [members for members in gp.joint_groups(model) if all(uses[member.weight] == 1 for member in members)]


def with_macs(split: SplitModel, before: Mapping[str, int], after: Mapping[str, int]) -> list[SiteRecord]:
    """The records with multiply-accumulates a sample, from those counted at each node of both models, by name.

    The first node of a joint split counts at its first site.
    """
    counted: set[str] = set()
    result = []
    made = {node.node: node for node in split.nodes if isinstance(node, gp.Split)}
    for site in split.sites:
        dense = sum(before.get(node, 0) for node in site.nodes) or None
        compressed = dense
        if dense is not None and site.rank is not None:
            pairs = [made[node] for node in site.nodes if node in made]
            nodes = {name for pair in pairs for name in (pair.first_node, pair.second_node)} - counted
            counted |= nodes
            compressed = sum(after.get(node, 0) for node in nodes | (set(site.nodes) - made.keys()))
        result.append(site.model_copy(update={"macs_dense": dense, "macs_compressed": compressed}))
    return result


def _by_weight(nodes: Iterable[gp.Record], splits: dict[str, SiteRecord]) -> list[SiteRecord]:
    """One record a weight (a node where no weight is known), in graph order, with the nodes that use it."""
    users: dict[str, list[gp.Record]] = {}
    for node in nodes:
        users.setdefault(node.weight or f"node {node.node}", []).append(node)
    result = []
    for weight, group in users.items():
        names = tuple(node.node for node in group)
        first = group[0]
        if weight in splits:
            form = first.form if isinstance(first, gp.Split) else None
            result.append(splits[weight].model_copy(update={"nodes": names, "form": form}))
            continue
        reason = first.reason if isinstance(first, gp.Skip) else "split"
        result.append(
            dense_record(
                site_name(weight),
                first.op_type,
                first.out_features,
                first.in_features,
                reason,
                groups=max(first.groups, 1),
                nodes=names,
            )
        )
    return result
