"""The time of a call by op type and by split site, from onnxruntime's profiler.

onnxruntime renames fused nodes, so a site is found in three ways: by the name of the node; by that name with a known
prefix or suffix ("fused X", "X_nchwc", "X/MatMulAddFusion", "X_token_3"); and by the name of its output, or of the last
node that is fused with it (a Conv in blocked layout with its Relu is "relu_nchwc").
"""

import os
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graph_passes import multiplies_by_weights
from graph_passes.split_markers import found_splits
from rsi_deploy.benchmark.sections import Profile, SiteTime
from rsi_deploy.benchmark.statistics import Floats
from rsi_deploy.benchmark.variants import Feeds, Runtime
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.profile_events import node_events, read_events
from rsi_deploy.runtime.sessions import make_session, model_label, run_session

PROFILE_CALLS = 20
_WARM = 3
_FUSED_BEHIND = 3  # largest number of nodes that onnxruntime fuses into a product: bias, activation, reshape
_ORNAMENTS = re.compile(r"^fused |(_nchwc|/MatMulAddFusion|_token_\d+|/GemmActivationFusion)+$")

Side = str  # "dense", "right" or "left"


def profile_models(
    models: Sequence[Path], labels: Sequence[str], feeds: Feeds, runtime: Runtime, calls: int = PROFILE_CALLS
) -> tuple[Profile, ...]:
    """Profile each model with the sites that any of the models has split.

    Args:
        models: files of the models.
        labels: one label per model.
        feeds: input name -> array.
        runtime: provider and threads.
        calls: number of profiled calls after 3 warm-up calls.

    Raises:
        UsageError, ModelError: as in `make_session` and `run_session`.
    """
    sites = split_sites(models)
    return tuple(
        read_profile(label, _events(model, feeds, runtime, calls), calls, _roles(model, sites))
        for model, label in zip(models, labels, strict=True)
    )


def read_profile(
    label: str, events: Sequence[Mapping[str, Any]], calls: int, roles: Mapping[str, tuple[str, Side]]
) -> Profile:
    """Compute the medians over the last `calls` runs in a profile.

    The time of a Loop, an If or a Scan excludes the nodes of its bodies.

    Args:
        label: label of the model.
        events: events of onnxruntime's profile.
        calls: number of runs after the warm-up.
        roles: name of a node -> (site, side).
    """
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])[-calls:]
    starts = [run["ts"] for run in runs]
    ops: dict[str, Floats] = {}
    nodes: dict[str, set[str]] = {}
    sites: dict[str, dict[Side, Floats]] = {site: {} for site, _ in roles.values()}
    for event in node_events(events):
        run = bisect_right(starts, event.start) - 1
        if run < 0:
            continue
        op, node = event.op_type, event.node
        nodes.setdefault(op, set()).add(node)
        ops.setdefault(op, np.zeros(len(runs)))[run] += event.own / 1e3
        role = roles.get(node) or roles.get(_ORNAMENTS.sub("", node))
        if role and multiplies_by_weights(op):
            site, side = role
            sites[site].setdefault(side, np.zeros(len(runs)))[run] += event.own / 1e3
    op_ms = {op: float(np.median(times)) for op, times in ops.items()}
    return Profile(
        label=label,
        calls=calls,
        call_ms=float(np.median([e["dur"] for e in runs])) / 1e3 if runs else 0.0,
        op_ms=dict(sorted(op_ms.items(), key=lambda item: -item[1])),
        op_nodes={op: len(nodes[op]) for op in op_ms},
        sites=tuple(
            SiteTime(site=site, **{f"{side}_ms": _median(times.get(side)) for side in ("dense", "right", "left")})
            for site, times in sites.items()
            if times
        ),
    )


def _median(times: Floats | None) -> float | None:
    return None if times is None else float(np.median(times))


def split_sites(models: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of the nodes that any of the models has split, in the order of its graph."""
    found: dict[str, None] = {}
    for model in models:
        if model.suffix != ".ort":  # onnxruntime's own format keeps no metadata of nodes
            found |= dict.fromkeys(found_splits(load_model(model)))
    return tuple(found)


def _roles(model: Path, sites: Sequence[str]) -> dict[str, tuple[str, Side]]:
    """Return the name of a node, or of one that may be fused with it -> its site and side."""
    if model.suffix == ".ort":
        return {name: (site, side) for site in sites for name, side in _names(site)}
    loaded = load_model(model)
    splits = found_splits(loaded)
    nodes = {node.name: node for node in loaded.graph if node.name}
    own: dict[str, tuple[str, Side]] = {}
    for site in sites:
        split = splits.get(site)
        if split is None:
            own[site] = (site, "dense")
            continue
        own.setdefault(split.first.name or "", (site, "right"))  # a shared first node counts once
        own[f"{site}/left"] = (site, "left")
    roles = dict(own)
    for name, role in own.items():
        for behind in _behind(nodes.get(name)):
            roles.setdefault(behind, role)
    return roles


def _names(site: str) -> tuple[tuple[str, Side], ...]:
    return (site, "dense"), (f"{site}/right", "right"), (f"{site}/left", "left")


def _behind(node: Any) -> list[str]:
    """Names that onnxruntime may give a node: of its output, and of the nodes that follow it alone, with theirs."""
    names: list[str] = []
    for _ in range(_FUSED_BEHIND + 1):
        if node is None or len(node.outputs) != 1:
            break
        names += [name for name in (node.name if names else None, node.outputs[0].name) if name]
        users = list(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
        node = users[0] if len(users) == 1 and not multiplies_by_weights(users[0].op_type) else None
    return names


def _events(model: Path, feeds: Feeds, runtime: Runtime, calls: int) -> list[dict[str, Any]]:
    with ScratchFolder() as folder:
        session = make_session(
            model,
            runtime.provider,
            runtime.threads,
            profile_prefix=os.path.join(folder, "profile"),
            spin_between_runs=False,
            allow_fallback=runtime.allow_fallback,
        )
        try:
            for _ in range(_WARM + calls):
                run_session(session, feeds, model_label(model))
        finally:
            path = session.end_profiling()
        return read_events(path)
