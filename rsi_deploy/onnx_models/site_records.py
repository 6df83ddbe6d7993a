"""Records of sites, from the records of the nodes that a split has rewritten."""

from collections.abc import Iterable, Mapping

import graph_passes as gp
from graph_passes.forms import FOLDED
from rsi_deploy.core.sites import SiteRecord, dense_record, site_name, smaller_record


def records_by_weight(nodes: Iterable[gp.Record], splits: Mapping[str, SiteRecord]) -> list[SiteRecord]:
    """Return one record for each weight (for a node without a known weight too), in graph order, with its nodes.

    Args:
        nodes: records of the nodes.
        splits: weight name -> record of its factors.
    """
    users: dict[str, list[gp.Record]] = {}
    for node in nodes:
        users.setdefault(_key(node), []).append(node)
    result = []
    for weight, group in users.items():
        names, first = tuple(node.node for node in group), group[0]
        if weight in splits:
            form = first.form if isinstance(first, gp.Split) else None
            result.append(splits[weight].model_copy(update={"nodes": names, "form": form}))
            continue
        result.append(
            dense_record(
                site_name(weight),
                first.op_type,
                first.out_features,
                first.in_features,
                first.reason if isinstance(first, gp.Skip) else "split",
                groups=max(first.groups, 1),
                nodes=names,
            )
        )
    return result


def record_name(node: gp.Record) -> str:
    """Return the name of the record of a node's weight."""
    return site_name(_key(node))


def _key(node: gp.Record) -> str:
    return node.weight or f"node {node.node}"


def with_fewer_units(
    sites: Iterable[SiteRecord], nodes: Iterable[gp.Record], units: Mapping[str, gp.Units]
) -> list[SiteRecord]:
    """Return the records with what is left of sites that make hidden units, or values of heads, for another one.

    Args:
        sites: records of the weights.
        nodes: records of the nodes.
        units: weight name -> what it reads.
    """
    left: dict[str, tuple[int, int, str, str]] = {}  # node name -> units kept, all units, what they are, their reader
    for node in nodes:
        if isinstance(node, gp.Split) and node.form in FOLDED:
            read, what = units[node.weight], "hidden units" if node.form == "units" else "numbers of each head"
            left |= dict.fromkeys(read.nodes, (node.rank // read.run, read.count, what, site_name(node.weight)))
    found = ((site, next((left[node] for node in site.nodes if node in left), None)) for site in sites)
    return [site if facts is None else smaller_record(site, *facts) for site, facts in found]


def with_macs(
    sites: Iterable[SiteRecord], nodes: Iterable[gp.Record], before: Mapping[str, int], after: Mapping[str, int]
) -> list[SiteRecord]:
    """Return the records with multiply-accumulates a sample.

    The shared first node of a joint split counts at its first site.

    Args:
        sites: records of the weights.
        nodes: records of the nodes.
        before: node name -> MACs in the dense model.
        after: node name -> MACs in the compressed model.
    """
    counted: set[str] = set()
    result = []
    splits = {node.node: node for node in nodes if isinstance(node, gp.Split)}
    for site in sites:
        dense = sum(before.get(node, 0) for node in site.nodes) or None
        compressed = dense
        if dense is not None and site.rank is None and site.params_compressed < site.params_dense:
            compressed = sum(after.get(node, 0) for node in site.nodes)
        if dense is not None and site.rank is not None:
            pairs = [splits[node] for node in site.nodes if node in splits]
            new = {name for pair in pairs for name in (pair.first_node, pair.second_node)} - counted
            counted |= new
            compressed = sum(after.get(node, 0) for node in new | (set(site.nodes) - splits.keys()))
        result.append(site.model_copy(update={"macs_dense": dense, "macs_compressed": compressed}))
    return result
