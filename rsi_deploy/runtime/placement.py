"""Which provider ran which node and how many copies it took, from onnxruntime's own profile.

A session that has the provider asked for may still run the work elsewhere: what the provider does not support goes
to the CPU, silently, and with a misspelt device all of it does. `proven_placement` refuses that unless it is allowed:
a provider that ran no node, or a node that carries the work (a matrix product, a convolution, an attention, a
recurrent layer) on another one. Shape arithmetic that onnxruntime keeps on the CPU on purpose is recorded only.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graph_passes import multiplies_by_weights
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.runtime.profile_events import node_events, read_events
from rsi_deploy.runtime.provider_spec import ProviderSpec, parse
from rsi_deploy.runtime.sessions import make_session, named, run_session


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who ran what in one run.

    Attributes:
        provider_nodes: provider -> number of distinct nodes it executed (after onnxruntime's own fusions).
        memcpy_nodes: copies between device and host that onnxruntime put in; counted in `provider_nodes` too.
        nodes: name of the executed node -> provider.
        ops: name of the executed node -> op type.
    """

    provider_nodes: dict[str, int]
    memcpy_nodes: int
    nodes: dict[str, str]
    ops: dict[str, str] = field(default_factory=dict)

    def elsewhere(self, provider: str) -> dict[str, str]:
        """Nodes that carry the work and ran on another provider -> that provider."""
        return {
            node: ran
            for node, ran in self.nodes.items()
            if ran != provider and multiplies_by_weights(self.ops.get(node, ""))
        }


def node_placement(
    model: str | Path | bytes,
    provider: str | ProviderSpec,
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Placement:
    """Run once under onnxruntime's profiler and count the executed nodes by provider.

    Args:
        model: as in `make_session`.
        provider: as in `make_session`.
        feeds: input name -> array.
        threads: as in `make_session`.
        allow_fallback: as in `make_session`.

    Raises:
        UsageError, ModelError: as in `make_session`; also when the run itself fails.
    """
    with ScratchFolder() as folder:
        prefix = os.path.join(folder, "profile")
        session = make_session(model, provider, threads, profile_prefix=prefix, allow_fallback=allow_fallback)
        try:
            run_session(session, feeds, named(model))
        finally:
            profile = session.end_profiling()
        return parse_profile(read_events(profile))


def proven_placement(
    model: str | Path | bytes,
    provider: str | ProviderSpec,
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int | None = None,
    allow_fallback: bool = False,
) -> Placement:
    """`node_placement`, refused where the provider did not do the work, whatever the session says.

    Args:
        model: as in `make_session`.
        provider: as in `make_session`.
        feeds: input name -> array.
        threads: as in `make_session`.
        allow_fallback: give the placement back as it is.

    Raises:
        UsageError: the provider ran nothing, or another one ran a node that carries the work; else as in
            `node_placement`.
    """
    asked = parse(provider)
    placement = node_placement(model, asked, feeds, threads, allow_fallback)
    if allow_fallback:
        return placement
    ran = ", ".join(f"{count} on {name}" for name, count in placement.provider_nodes.items()) or "none at all"
    if not placement.provider_nodes.get(asked.name):
        raise UsageError(
            f"{named(model)}: asked for {asked.name}, but it ran no node of this model (nodes run: {ran}); "
            f"rsi-deploy bench --allow-fallback measures it all the same"
        )
    if elsewhere := placement.elsewhere(asked.name):
        node, other = next(iter(elsewhere.items()))
        raise UsageError(
            f"{named(model)}: asked for {asked.name}, but {len(elsewhere)} nodes that carry the work ran elsewhere, "
            f"such as {node} ({placement.ops[node]}) on {other} (nodes run: {ran}); "
            f"rsi-deploy bench --allow-fallback measures it all the same"
        )
    return placement


def parse_profile(events: list[dict[str, Any]]) -> Placement:
    """Count the distinct nodes in a profile's events; a node in a loop counts once.

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
    )
