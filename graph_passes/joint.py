"""Products of the same data: one factorization for all of them, with one shared right factor.

+--> MatMul W_q^T --> q                                 +--> MatMul left_q^T --> q
X --+--> MatMul W_k^T --> k    becomes    X --> MatMul -----+--> MatMul left_k^T --> k
+--> MatMul W_v^T --> v                     right^T     +--> MatMul left_v^T --> v

[W_q; W_k; W_v] (out_q + out_k + out_v, in) ~ left @ right,    left cut by rows into left_q, left_k, left_v
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from graph_passes.records import Array, Site, Skip, SplitFactors
from graph_passes.survey import Found


def joint_members(entries: Iterable[Found | Skip]) -> list[tuple[Found, ...]]:
    """Return the groups of two or more nodes of one graph that can share the first node of their splits."""
    found = [entry for entry in entries if isinstance(entry, Found)]
    uses = Counter(entry.key for entry in found)
    groups: dict[object, list[Found]] = {}
    for entry in found:
        if entry.splitter.shares_right(entry) and uses[entry.key] == 1:
            weight = entry.weight
            kind = entry.data, entry.node.graph, weight.dtype, weight.stored_dtype, entry.site.in_features
            groups.setdefault(kind, []).append(entry)
    return [tuple(members) for members in groups.values() if len(members) > 1]


def joint_site(members: Sequence[Found]) -> Site:
    """Return the site of the stacked weights, `(1, sum of out, in)`."""
    sites = [member.site for member in members]

    def load() -> Array:
        return np.concatenate([site.load() for site in sites], axis=1)

    return Site(
        node=" + ".join(site.node for site in sites),
        op_type=sites[0].op_type,
        weight=" + ".join(site.weight for site in sites),
        out_features=sum(site.out_features for site in sites),
        in_features=sites[0].in_features,
        groups=1,
        dtype=sites[0].dtype,
        members=tuple(site.weight for site in sites),
        loader=load,
        forms=sites[0].forms,
        data=sites[0].data,
        output=" + ".join(site.output for site in sites),
        nested=sites[0].nested,
        row_order=sites[0].row_order if all(site.plain for site in sites) else None,
    )


def cut(factors: SplitFactors, members: Sequence[Found]) -> list[SplitFactors]:
    """Return the factors of each member: its rows of `left`, its part of the bias, and `right` as it is."""
    ends = np.cumsum([member.site.out_features for member in members])[:-1]
    lefts = np.split(factors.left, ends, axis=1)
    biases = [None] * len(members) if factors.bias is None else np.split(factors.bias, ends)
    return [SplitFactors(left=left, right=factors.right, bias=bias) for left, bias in zip(lefts, biases, strict=True)]
