"""Which provider ran which node, and how many copies were inserted, from onnxruntime's profile.

Even if a session has the requested provider, nodes that the provider does not support run on the CPU without notice;
with a wrong device all of them do. `proven_placement` refuses this unless it is allowed: the provider ran no node, or
another provider ran a node with most of the work (a matrix product, convolution, attention or recurrent layer). Shape
arithmetic that onnxruntime keeps on the CPU is only recorded.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.runtime.profile_events import node_events, read_events
from rsi_deploy.runtime.provider_spec import ProviderSpec, parse_provider
from rsi_deploy.runtime.sessions import make_session, model_label, run_session


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The provider of each node in one run.

    Attributes:
        provider_nodes: provider -> number of distinct nodes it ran (after onnxruntime's fusions).
        memcpy_nodes: copies between device and host that onnxruntime inserted; also counted in `provider_nodes`.
        nodes: name of the executed node -> provider.
        ops: name of the executed node -> op type.
        op_counts: op type -> number of distinct nodes of it; nodes without a name count, too.
    """

    provider_nodes: dict[str, int]
    memcpy_nodes: int
    nodes: dict[str, str]
    ops: dict[str, str] = field(default_factory=dict)
    op_counts: dict[str, int] = field(default_factory=dict)

    def elsewhere(self, provider: str) -> dict[str, str]:
        """Return the nodes with most of the work that ran on another provider, with that provider."""
        from graph_passes import multiplies_by_weights  # loads onnx

        return {
            node: ran
            for node, ran in self.nodes.items()
            if ran != provider and multiplies_by_weights(self.ops.get(node, ""))
        }


def node_placement(
    model: str | Path | bytes,
    provider: str | ProviderSpec,
    feeds: Feeds,
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Placement:
    """Run once with onnxruntime's profiler and count the executed nodes by provider.

    Args:
        model: as in `make_session`.
        provider: as in `make_session`.
        feeds: input name -> array.
        threads: as in `make_session`.
        allow_fallback: as in `make_session`.

    Raises:
        UsageError, ModelError: As in `make_session`; also if the run fails.
    """
    with ScratchFolder() as folder:
        prefix = os.path.join(folder, "profile")
        session = make_session(model, provider, threads, profile_prefix=prefix, allow_fallback=allow_fallback)
        try:
            run_session(session, feeds, model_label(model))
        finally:
            profile = session.end_profiling()
        return parse_profile(read_events(profile))


def proven_placement(
    model: str | Path | bytes,
    provider: str | ProviderSpec,
    feeds: Feeds,
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Placement:
    """Return `node_placement`, or raise if the provider did not do the work.

    Args:
        model: as in `make_session`.
        provider: as in `make_session`.
        feeds: input name -> array.
        threads: as in `make_session`.
        allow_fallback: whether to accept any placement.

    Raises:
        UsageError: The provider ran nothing, or another one ran a node with most of the work; else as in
            `node_placement`.
    """
    requested = parse_provider(provider)
    placement = node_placement(model, requested, feeds, threads, allow_fallback)
    if allow_fallback:
        return placement
    ran = ", ".join(f"{count} on {name}" for name, count in placement.provider_nodes.items()) or "none at all"
    advice = "rsi-deploy bench --allow-fallback measures it anyway"
    if not placement.provider_nodes.get(requested.name):
        raise UsageError(
            f"{model_label(model)}: {requested.name} was requested, but it ran no node of this model (nodes run: "
            f"{ran})",
            hint=advice,
        )
    if elsewhere := placement.elsewhere(requested.name):
        node, other = next(iter(elsewhere.items()))
        raise UsageError(
            f"{model_label(model)}: {requested.name} was requested, but {len(elsewhere)} nodes with most of the work "
            f"ran elsewhere, such as {node} ({placement.ops[node]}) on {other} (nodes run: {ran})",
            hint=advice,
        )
    return placement


def parse_profile(events: list[dict[str, Any]]) -> Placement:
    """Read the placement from a profile's events; a node in a loop counts once.

    >>> event = {"cat": "Node", "name": "fc_kernel_time", "args": {"provider": "P", "node_index": "0"}}
    >>> parse_profile([event, event]).provider_nodes
    {'P': 1}
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for event in node_events(events):
        if provider := event.args.get("provider"):
            seen[event.node, str(event.args.get("node_index"))] = (provider, event.op_type)
    counts: dict[str, int] = {}
    for provider, _ in seen.values():
        counts[provider] = counts.get(provider, 0) + 1
    return Placement(
        provider_nodes=dict(sorted(counts.items())),
        memcpy_nodes=sum(op.startswith("Memcpy") for _, op in seen.values()),
        nodes={node: provider for (node, _), (provider, _) in seen.items()},
        ops={node: op for (node, _), (_, op) in seen.items()},
        op_counts=dict(sorted(Counter(op for _, op in seen.values()).items())),
    )
