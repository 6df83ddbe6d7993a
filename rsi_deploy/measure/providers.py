"""Execution providers by their short names, sessions that run where they were asked to, and the proof of it.

onnxruntime answers a provider it cannot start with another one, so a "GPU" measurement may be a CPU one. Here
a session either has the provider that was asked for in the first place, or it is refused with the reason;
`node_placement` then counts which provider executed each node, from onnxruntime's own profile.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure.machine import onnxruntime_distributions

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

_SUFFIX = "ExecutionProvider"
_ALIASES = {"gpu": "cuda", "trt": "tensorrt", "directml": "dml"}  # what people type -> onnxruntime's word
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}

Optimize = Literal["all", "extended", "basic", "disabled"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who ran what in one run.

    Attributes:
        provider_nodes: provider -> number of distinct nodes it executed (after onnxruntime's own fusions).
        memcpy_nodes: copies between device and host that onnxruntime put in; counted in `provider_nodes` too.
        nodes: name of the executed node -> provider.
    """

    provider_nodes: dict[str, int]
    memcpy_nodes: int
    nodes: dict[str, str]


def available() -> list[str]:
    """Full names of the providers this onnxruntime offers, built in or registered as plug-ins, best first."""
    import onnxruntime

    names = list(onnxruntime.get_available_providers())
    plugins = [device.ep_name for device in getattr(onnxruntime, "get_ep_devices", list)()]
    return list(dict.fromkeys(names + plugins))


def short_name(provider: str) -> str:
    """What the command line calls a provider.

    >>> short_name("CUDAExecutionProvider")
    'cuda'
    """
    return provider.removesuffix(_SUFFIX).lower()


def resolve(name: str) -> str:
    """The full name of a provider given as `cpu`, `cuda`, `CUDAExecutionProvider`..., in any case.

    Raises:
        UsageError: this onnxruntime does not offer it; names those it offers and what to install.
    """
    names = available()
    wanted = short_name_of_user(name)
    for provider in names:
        if short_name(provider) == wanted:
            return provider
    raise UsageError(
        f"provider {name!r} is not offered by the installed onnxruntime; available: "
        f"{', '.join(short_name(provider) for provider in names)}. {_install_hint(wanted)}"
    )


def make_session(
    model: str | Path | bytes,
    provider: str = "cpu",
    threads: int | None = None,
    optimize: Optimize = "all",
    prepack: bool = True,
    profile_prefix: str | None = None,
    spin_between_runs: bool = True,
) -> "InferenceSession":
    """Load a model on the provider that was asked for, or refuse.

    Args:
        model: an ONNX file, or a serialized model.
        provider: short or full name.
        threads: threads inside one operator; None leaves onnxruntime's default (the physical cores).
        optimize: onnxruntime's graph optimization level.
        prepack: rearrange weights at load time: faster, more memory.
        profile_prefix: start onnxruntime's profiler with this file prefix.
        spin_between_runs: let idle workers spin after a run. Off where several sessions share the cores.

    Raises:
        UsageError: unknown provider, fewer than one thread, or the provider did not start.
        ModelError: the model cannot be read or built, with onnxruntime's own words.
    """
    import onnxruntime

    full_name = resolve(provider)
    name = _named(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{name}: no such file; expected an ONNX model")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, but got {threads}")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[optimize])
    options.intra_op_num_threads = threads or 0  # 0 is onnxruntime's word for its default
    options.log_severity_level = 3  # errors; a model with initializers among its inputs warns once for each
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not spin_between_runs:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if short_name(full_name) in ("cuda", "tensorrt") and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = _created(model if isinstance(model, bytes) else str(model), name, full_name, options)
    first = session.get_providers()[0]
    if first != full_name:
        raise UsageError(
            f"{name}: asked for {full_name}, but onnxruntime fell back to {first}: the provider did not "
            f"start (its reason is on stderr, from onnxruntime). {_install_hint(short_name(full_name))}"
        )
    return session


def node_placement(
    model: str | Path | bytes,
    provider: str,
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int | None = None,
) -> Placement:
    """Run once under onnxruntime's profiler and count the executed nodes by provider.

    Args:
        model: as in `make_session`.
        provider: as in `make_session`.
        feeds: input name -> array.
        threads: as in `make_session`.

    Raises:
        UsageError, ModelError: as in `make_session`; also when the run itself fails.
    """
    with tempfile.TemporaryDirectory(prefix="rsi-deploy-") as folder:
        session = make_session(model, provider, threads, profile_prefix=os.path.join(folder, "profile"))
        try:
            run_session(session, feeds, _named(model))
        finally:
            profile = session.end_profiling()
        return parse_profile(json.loads(Path(profile).read_text(encoding="utf-8")))


def proven_placement(
    model: str | Path | bytes,
    provider: str,
    feeds: Mapping[str, npt.NDArray[Any]],
    threads: int | None = None,
) -> Placement:
    """`node_placement`, refused where the provider ran no node at all: it was not used, whatever the session says.

    Raises:
        UsageError: the provider ran nothing; else as in `node_placement`.
    """
    placement = node_placement(model, provider, feeds, threads)
    asked = resolve(provider)
    if not placement.provider_nodes.get(asked):
        ran = ", ".join(f"{count} on {name}" for name, count in placement.provider_nodes.items()) or "none at all"
        raise UsageError(f"{_named(model)}: asked for {asked}, but it ran no node of this model (nodes run: {ran})")
    return placement


def parse_profile(events: list[dict[str, Any]]) -> Placement:
    """Count the distinct nodes in a profile's events; a node in a loop counts once.

    >>> event = {"cat": "Node", "name": "fc_kernel_time", "args": {"provider": "P", "node_index": "0"}}
    >>> parse_profile([event, event]).provider_nodes
    {'P': 1}
    """
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for event in events:
        args = event.get("args", {})
        name, provider = str(event.get("name", "")), args.get("provider")
        if event.get("cat") == "Node" and provider and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            seen[node, str(args.get("node_index"))] = (provider, args.get("op_name", ""))
    counts: dict[str, int] = {}
    for provider, _ in seen.values():
        counts[provider] = counts.get(provider, 0) + 1
    return Placement(
        provider_nodes=dict(sorted(counts.items())),
        memcpy_nodes=sum(op.startswith("Memcpy") for _, op in seen.values()),
        nodes={node: provider for (node, _), (provider, _) in seen.items()},
    )


def run_session(
    session: "InferenceSession", feeds: Mapping[str, npt.NDArray[Any]], name: str
) -> list[npt.NDArray[Any]]:
    """One run with the failure said as ours.

    Raises:
        ModelError: onnxruntime refused the inputs or a node failed; carries its message and `name`.
    """
    try:
        outputs: list[npt.NDArray[Any]] = session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
        raise ModelError(f"{name}: the run failed: {error}") from error
    return outputs


def short_name_of_user(name: str) -> str:
    """What a user typed as a short name: any case, full or short, aliases resolved.

    >>> short_name_of_user("GPU"), short_name_of_user("cudaexecutionprovider")
    ('cuda', 'cuda')
    """
    wanted = name.strip().lower().removesuffix(_SUFFIX.lower())
    return _ALIASES.get(wanted, wanted)


def _named(model: str | Path | bytes) -> str:
    return "the model in memory" if isinstance(model, bytes) else str(model)


def _created(model: str | bytes, name: str, provider: str, options: Any) -> "InferenceSession":
    """A session on `provider`; a plug-in is added by its devices, TensorRT leaves over to CUDA."""
    import onnxruntime

    # enable_fallback=0: neither loading nor a failing run may move to another provider
    built_in = onnxruntime.get_available_providers()
    try:
        if provider not in built_in:
            devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == provider]
            options.add_provider_for_devices(devices, {})
            return onnxruntime.InferenceSession(model, options, enable_fallback=0)
        chain = [provider]
        if "tensorrt" in provider.lower() and "CUDAExecutionProvider" in built_in:
            chain.append("CUDAExecutionProvider")
        with warnings.catch_warnings(record=True) as caught:
            session = onnxruntime.InferenceSession(model, options, providers=chain, enable_fallback=0)
        for warning in caught:
            logger.warning("%s: %s", name, warning.message)
        return session
    except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
        raise ModelError(f"{name}: onnxruntime cannot load it on {provider}: {error}") from error


def _install_hint(wanted: str) -> str:
    """What to type so that a provider becomes available."""
    installed = [f"{name} {version}" for name, version in onnxruntime_distributions().items()]
    state = f"Installed: {', '.join(installed) or 'no onnxruntime distribution'}."
    if len(installed) > 1:
        state += " They overwrite each other's files: uninstall all of them, then install one."
    if wanted in ("cuda", "tensorrt"):
        return f"{state} For {wanted}: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    return f"{state} Providers come with the onnxruntime package that was built for them (onnxruntime-{wanted})."
