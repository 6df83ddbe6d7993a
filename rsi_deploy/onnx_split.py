"""The ONNX way: plan the sites of a graph, factorize each weight once, and have graph_passes split the nodes.

    find_sites --> Planner.decide --> Solver (RSI) --> graph_passes.split --> one record a weight

Weights are read one at a time from the model's memory or memory map and are not kept.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

import graph_passes as gp
from rsi_deploy.plan import Planner, site_name
from rsi_deploy.rsi import Solver
from rsi_deploy.sites import SiteRecord, dense_record, factorize_site

Progress = Callable[[str, int, int], None]
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """What `split_graph` did: a record for every weight, and for every node."""

    sites: tuple[SiteRecord, ...]
    nodes: tuple[gp.Record, ...]
    kept: dict[str, gp.Factors]


def split_graph(
    model: ir.Model,
    planner: Planner,
    solver: Solver,
    *,
    progress: Progress | None = None,
    keep: Iterable[str] = (),
    device: torch.device = CPU,
    store: gp.Keep = gp.in_memory,
) -> SplitModel:
    """Split `model` in place as the planner decides, with factors from the solver.

    Args:
        model: the dense graph; BatchNorms already folded.
        planner: decides each site by its name and shape.
        solver: computes factors.
        progress: called with (site, index, count) before each factorization.
        keep: names of weights whose factors the caller wants to see.
        device: where factors are computed.
        store: where they are kept until the model is written.

    Raises:
        UsageError: filters or ranks that cannot be meant for this model.
        ModelError: NaN or infinite values in a weight, with the site's name.
    """
    found = gp.find_sites(model)
    sites = [entry for entry in found if isinstance(entry, gp.Site)]
    planner.check([(site_name(s.weight), s.out_features, s.in_features) for s in sites])
    order = list(dict.fromkeys(s.weight for s in sites))
    del found, sites  # a site holds its dense weight; from here on each is let go as soon as it is split
    records: dict[str, SiteRecord] = {}
    kept: dict[str, gp.Factors] = {}
    wanted = set(keep)

    def factors_of(site: gp.Site) -> gp.Factors | gp.Dense:
        name = site_name(site.weight)
        decision = planner.decide(name, site.out_features, site.in_features)
        if decision.rank is None:
            return gp.Dense(reason=decision.reason)
        if progress:
            progress(name, order.index(site.weight), len(order))
        pair, record = factorize_site(
            name, site.op_type, as_torch(site.load()).to(device), decision.rank, solver, reason=decision.reason
        )
        factors = gp.Factors(left=as_numpy(pair.left.cpu()), right=as_numpy(pair.right.cpu()))
        records[site.weight] = record
        if site.weight in wanted:
            kept[site.weight] = factors
        return factors

    nodes = gp.split(model, factors_of, keep=store)
    return SplitModel(sites=tuple(_by_weight(nodes, records)), nodes=tuple(nodes), kept=kept)


def with_macs(sites: Iterable[SiteRecord], macs: dict[str, int]) -> list[SiteRecord]:
    """The records with multiply-accumulates a sample, from those of each dense node by its name."""
    result = []
    for site in sites:
        dense = sum(macs.get(node, 0) for node in site.nodes) or None
        compressed = dense
        if dense is not None and site.rank is not None:
            # Every position of the output costs out*in before and rank*(out+in) after. A strided Conv's first
            # factor works at the output's positions too, so this is exact for the channel form.
            compressed = round(dense * site.params_compressed / site.params_dense)
        result.append(site.model_copy(update={"macs_dense": dense, "macs_compressed": compressed}))
    return result


def as_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's memory, bfloat16 included; it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # memory maps are read-only, and so are we
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """An array on the tensor's memory, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _by_weight(nodes: Iterable[gp.Record], splits: dict[str, SiteRecord]) -> list[SiteRecord]:
    """One record a weight (a node where no weight is known), in graph order, with the nodes that use it."""
    users: dict[str, list[gp.Record]] = {}
    for node in nodes:
        users.setdefault(node.weight or f"node {node.node}", []).append(node)
    result = []
    for weight, group in users.items():
        names = tuple(node.node for node in group)
        if weight in splits:
            result.append(splits[weight].model_copy(update={"nodes": names}))
            continue
        first = group[0]
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
