"""Create onnxruntime sessions that run on the requested provider or raise an error.

onnxruntime silently replaces a provider that does not start, so a "GPU" measurement may come from a CPU. A session from
this module has the requested provider first. A provider option is refused if the provider lists its options without
it, or if the provider refuses it.
"""

import functools
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.provider_spec import (
    SESSION_OPTIONS,
    ProviderSpec,
    checks_options,
    parse_provider,
    unknown_option,
)
from rsi_deploy.runtime.providers import install_hint, plugin_devices, short_name

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

Optimize = Literal["all", "layout", "extended", "basic", "disabled"]

ERRORS, WARNINGS = 3, 2
"""Severities of onnxruntime's log; a model whose initializers are also inputs gets one warning for each of them."""
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CUDA_FAMILY = ("cuda", "tensorrt", "nvtensorrtrtx")
"""Short names of the providers that keep tensors in CUDA memory."""


def make_session(
    model: str | Path | bytes,
    provider: str | ProviderSpec = "cpu",
    threads: int | None = None,
    optimize: Optimize = "all",
    prepack: bool = True,
    profile_prefix: str | None = None,
    spin_between_runs: bool = True,
    arena: bool = True,
    allow_fallback: bool = False,
    checked: bool = False,
    data_folder: Path | None = None,
) -> "InferenceSession":
    """Load a model on the requested provider.

    Args:
        model: ONNX file, or a serialized model.
        provider: short or full name, with options; its session options take precedence over the arguments.
        threads: threads within one operator; None uses onnxruntime's default (the physical cores).
        optimize: onnxruntime's graph optimization level.
        prepack: whether to rearrange weights when loading, which is faster and needs more memory.
        profile_prefix: file prefix for onnxruntime's profile; None disables profiling.
        spin_between_runs: whether idle workers spin after a run; False where several sessions share the cores.
        arena: whether to keep the memory of a run for the next one, which is faster and keeps the largest run's memory.
        allow_fallback: whether to accept another provider if the requested one does not start.
        checked: whether the file needs no check by `rsi_deploy.io.onnx_reader`, because another process has checked
            it or it was made from a checked model.
        data_folder: folder of the external data of a serialized model.

    Raises:
        UsageError: The provider or an option is unknown, `threads` is below 1 or contradicts the provider's options, or
            the provider did not start.
        ModelError: The model cannot be read or built; the message includes onnxruntime's.
    """
    import onnxruntime

    spec = parse_provider(provider)
    name = model_label(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{name}: no such file", hint="expected an ONNX model")
    if not isinstance(model, bytes) and Path(model).suffix != ".ort" and not checked:
        from rsi_deploy.io.onnx_reader import check_file

        check_file(model)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, but got {threads}")
    if threads is not None and spec.session.get("threads", str(threads)) != str(threads):
        raise UsageError(f"{threads} threads and --provider {spec} contradict each other", hint="give one of them")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS
    options.intra_op_num_threads = threads or 0  # 0 is onnxruntime's default
    SESSION_OPTIONS["optimization"].set_(options, optimize)
    if not prepack:
        SESSION_OPTIONS["prepacking"].set_(options, "off")
    if not arena and "arena" not in spec.session:
        SESSION_OPTIONS["arena"].set_(options, "off")
    if not spin_between_runs and "spinning" not in spec.session:
        SESSION_OPTIONS["spinning"].set_(options, "run")
    spec.apply_(options)
    if data_folder is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(data_folder.resolve()))
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    _check_options(spec)
    session = _created(model if isinstance(model, bytes) else str(model), name, spec, options)
    first = session.get_providers()[0]
    if first != spec.name and not allow_fallback:
        options_text = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        advice = f"Try it without {options_text}" if options_text else install_hint(short_name(spec.name))
        raise UsageError(
            f"{name}: {spec.name} was requested, but onnxruntime fell back to {first}: the provider did not start "
            f"(onnxruntime printed the reason on stderr). {advice}",
            hint="bench --allow-fallback measures what runs instead",
        )
    listed = session.get_provider_options().get(spec.name, {})
    if first == spec.name and listed and (unknown := [key for key in spec.options if key not in listed]):
        raise unknown_option(spec.name, unknown[0], tuple(sorted(listed)))
    _check_denormals(spec)
    return session


@contextmanager
def tools_log_errors_only() -> Iterator[None]:
    """Keep the warnings of sessions that onnxruntime's own tools make off stderr; afterwards its default holds."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(ERRORS)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(WARNINGS)


def flushes_denormals() -> bool:
    """Return whether arithmetic on this thread treats denormals (float32 below 2**-126) as zero."""
    tiny = np.full(1, 2.0**-70, np.float32)
    return not (tiny * tiny).any()


def run_session(session: "InferenceSession", feeds: Feeds, name: str) -> list[Value]:
    """Run a session once and return its outputs.

    Raises:
        ModelError: The inputs do not fit or a node failed; the message has onnxruntime's and `name`.
    """
    try:
        outputs: list[Value] = session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions have no narrower base class
        raise ModelError(f"{name}: the run failed: {str(error).strip()}", hint="give inputs that fit it") from error
    return outputs


def effective_options(session: "InferenceSession", provider: str | ProviderSpec) -> dict[str, str]:
    """Return all provider options with their values, including defaults, and the session options.

    Where the provider does not list its options (CPU, OpenVINO), only the requested ones are returned.
    """
    spec = parse_provider(provider)
    listed: dict[str, str] = session.get_provider_options().get(spec.name, {})
    return {**spec.session, **spec.options, **listed}


def session_notes(session: "InferenceSession", provider: str | ProviderSpec) -> list[str]:
    """Return notes for a measured time: its arithmetic, and options that the provider does not confirm."""
    spec = parse_provider(provider)
    notes = numeric_notes(effective_options(session, spec), spec)
    listed = session.get_provider_options().get(spec.name, {})
    if spec.options and not listed and not checks_options(spec.name):
        requested = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        notes.append(f"{short_name(spec.name)} does not report its options: {requested} is not confirmed")
    return notes


def numeric_notes(settings: Mapping[str, str], provider: str | ProviderSpec) -> list[str]:
    """Return notes on the arithmetic of a provider; none for a CPU.

    >>> numeric_notes({}, "cpu")
    []
    """
    name = provider.name if isinstance(provider, ProviderSpec) else provider
    family = name.lower()
    if "tensorrt" in family:
        half = [key for key in ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable") if settings.get(key) == "1"]
        text = f"lower precision is on: {', '.join(half)}" if half else "16- and 8-bit arithmetic is off"
        return [f"{text}; TensorRT may use TF32 unless NVIDIA_TF32_OVERRIDE=0 is set"]
    if "cuda" not in family:
        return []
    if settings.get("use_tf32", "1") == "0":
        return ["TF32 is off: float32 products have 23 bits of mantissa (use_tf32=0)"]
    return ["TF32 is on: on Ampere and later, float32 products have 10 bits of mantissa; cuda:use_tf32=0 turns it off"]


@functools.cache
def known_options(name: str) -> tuple[str, ...]:
    """Return the sorted options that a provider lists, from a session of one node; empty if it lists none.

    Args:
        name: full name of the provider.

    Raises:
        UsageError: The provider does not start.
    """
    spec = ProviderSpec(name=name, session={}, options={})
    session = make_session(_one_node(), spec)
    return tuple(sorted(session.get_provider_options().get(name, {})))


def model_label(model: str | Path | bytes) -> str:
    """Return a name for a model in messages."""
    return "the model in memory" if isinstance(model, bytes) else str(model)


def _check_options(spec: ProviderSpec) -> None:
    known = known_options(spec.name) if spec.options else ()
    for key in spec.options:
        if known and key not in known:
            raise unknown_option(spec.name, key, known)


def _check_denormals(spec: ProviderSpec) -> None:
    """Raise if the requested handling differs from this thread's: only the first session of a process sets it."""
    requested = spec.session.get("denormals")
    if requested is not None and (requested == "zero") != flushes_denormals():
        raise UsageError(
            f"denormals={requested} conflicts with an earlier session: the first session of a process decides",
            hint="measure it in a process of its own",
        )


def _created(model: str | bytes, name: str, spec: ProviderSpec, options: Any) -> "InferenceSession":
    """Create a session; a plug-in is added by its devices, and TensorRT leaves unsupported nodes to CUDA."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # on Windows; elsewhere rsi_deploy/__init__.py did
    built_in = onnxruntime.get_available_providers()
    if short_name(spec.name) in CUDA_FAMILY and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        # enable_fallback=0: neither loading nor a failed run may switch to another provider
        if spec.name not in built_in:
            options.add_provider_for_devices(plugin_devices(spec.name), dict(spec.options))
            return onnxruntime.InferenceSession(model, options, enable_fallback=0)
        with warnings.catch_warnings(record=True) as caught:
            chain = _chain(spec, built_in)
            session = onnxruntime.InferenceSession(model, options, providers=chain, enable_fallback=0)
        for warning in caught:
            logger.warning("%s: %s", name, warning.message)
        return session
    except Exception as error:  # onnxruntime's exceptions have no narrower base class
        _refuse_option(spec, str(error))
        advice = ""
        if "not support the following ONNX operations" in str(error):  # message of OpenVINO 2025.4
            advice = "; an older opset may use operators that it supports: export with --opset 20"
        message = " ".join(str(error).split())
        raise ModelError(f"{name}: onnxruntime cannot load it on {spec.name}: {message}{advice}") from error


def _refuse_option(spec: ProviderSpec, message: str) -> None:
    """Raise a UsageError if the provider's error message names one of the options."""
    for key, value in spec.options.items():
        if re.search(rf"(unknown|invalid|unrecognized)\b.*\boption\W+{key}\b", message, re.IGNORECASE):
            raise unknown_option(spec.name, key, ())
        if key in message and "option" in message.lower():
            raise UsageError(
                f"--provider {spec}: {short_name(spec.name)} refuses {key}={value}: {message.strip()}",
                hint="leave it out, or give another value",
            )


def _chain(spec: ProviderSpec, built_in: list[str]) -> list[tuple[str, dict[str, str]]]:
    chain = [(spec.name, dict(spec.options))]
    if "tensorrt" in spec.name.lower() and "CUDAExecutionProvider" in built_in:
        device = {"device_id": spec.options["device_id"]} if "device_id" in spec.options else {}
        chain.append(("CUDAExecutionProvider", device))
    return chain


def _one_node() -> bytes:
    """Return the smallest model, `y = relu(x)` with float32 `x (1,)`."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())
