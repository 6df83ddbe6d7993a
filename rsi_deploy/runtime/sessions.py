"""Sessions that run where they were asked to, or not at all.

onnxruntime answers a provider it cannot start with another one, so a "GPU" measurement may be a CPU one. Here a
session either has the provider that was asked for in the first place, or it is refused with the reason. The same
for options: a key is refused if the provider lists its options and it is not among them, or if it refuses it itself.
"""

import functools
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.provider_spec import SESSION_OPTIONS, ProviderSpec, checks_options, parse, unknown_option
from rsi_deploy.runtime.providers import install_hint, plugin_devices, short_name

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

logger = logging.getLogger(__name__)

Optimize = Literal["all", "layout", "extended", "basic", "disabled"]

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
CUDA_FAMILY = ("cuda", "tensorrt", "nvtensorrtrtx")
"""Short names of the providers whose memory is a CUDA device's."""


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
    """Load a model on the provider that was asked for, or refuse.

    Args:
        model: an ONNX file, or a serialized model.
        provider: short or full name, with options; its session options win over the arguments here.
        threads: threads inside one operator; None leaves onnxruntime's default (the physical cores).
        optimize: onnxruntime's graph optimization level.
        prepack: rearrange weights at load time: faster, more memory.
        profile_prefix: start onnxruntime's profiler with this file prefix.
        spin_between_runs: let idle workers spin after a run. Off where several sessions share the cores.
        arena: keep the memory of a run for the next one: faster, and as much as the largest run needs.
        allow_fallback: take a session on another provider where the one asked for does not start.
        checked: the file need not be held against itself (`rsi_deploy.io.onnx_reader`): another process of ours
            has done so, and this one measures its own time and memory; or it was made of a model that was.
        data_folder: where the external data of a serialized model lie.

    Raises:
        UsageError: unknown provider or option, fewer than one thread or two numbers of them, or the provider did
            not start.
        ModelError: the model cannot be read or built, with onnxruntime's own words.
    """
    import onnxruntime

    spec = parse(provider)
    name = named(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise ModelError(f"{name}: no such file; expected an ONNX model")
    if not isinstance(model, bytes) and Path(model).suffix != ".ort" and not checked:
        from rsi_deploy.io.onnx_reader import check_file

        check_file(model)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, but got {threads}")
    if threads is not None and spec.session.get("threads", str(threads)) != str(threads):
        raise UsageError(f"{threads} threads and --provider {spec} contradict each other; give one of them")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a model with initializers among its inputs warns once for each
    options.intra_op_num_threads = threads or 0  # 0 is onnxruntime's word for its default
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
        given = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        mend = f"Try it without {given}" if given else install_hint(short_name(spec.name))
        raise UsageError(
            f"{name}: asked for {spec.name}, but onnxruntime fell back to {first}: the provider did not start "
            f"(its reason is on stderr, from onnxruntime). {mend}; bench --allow-fallback measures what runs instead"
        )
    listed = session.get_provider_options().get(spec.name, {})
    if first == spec.name and listed and (lost := [key for key in spec.options if key not in listed]):
        raise unknown_option(spec.name, lost[0], tuple(sorted(listed)))
    _check_denormals(spec)
    return session


def flushes_denormals() -> bool:
    """Whether arithmetic on this thread takes denormals for zero; float32 below 2**-126 are denormal."""
    tiny = np.full(1, 2.0**-70, np.float32)
    return not (tiny * tiny).any()


def run_session(session: "InferenceSession", feeds: Mapping[str, npt.NDArray[Any]], name: str) -> list[Value]:
    """One run with the failure said as ours.

    Raises:
        ModelError: onnxruntime refused the inputs or a node failed; carries its message and `name`.
    """
    try:
        outputs: list[Value] = session.run(None, dict(feeds))
    except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
        raise ModelError(f"{name}: the run failed: {str(error).strip()}; give inputs that fit it") from error
    return outputs


def settings_in_force(session: "InferenceSession", provider: str | ProviderSpec) -> dict[str, str]:
    """Every option of the provider with the value in force, defaults included, for the record.

    Where the provider lists none (CPU, OpenVINO), those that were given.
    """
    spec = parse(provider)
    listed: dict[str, str] = session.get_provider_options().get(spec.name, {})
    return {**spec.session, **spec.options, **listed}


def session_notes(session: "InferenceSession", provider: str | ProviderSpec) -> list[str]:
    """What belongs beside a time: the arithmetic behind it, and options that nobody confirmed."""
    spec = parse(provider)
    notes = numeric_notes(settings_in_force(session, spec), spec)
    listed = session.get_provider_options().get(spec.name, {})
    if spec.options and not listed and not checks_options(spec.name):
        taken = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        notes.append(f"{short_name(spec.name)} does not say which options it took: {taken} is not confirmed")
    return notes


def numeric_notes(settings: Mapping[str, str], provider: str | ProviderSpec) -> list[str]:
    """What a reader of a time must know about the arithmetic behind it; nothing on a CPU.

    >>> numeric_notes({}, "cpu")
    []
    """
    name = provider.name if isinstance(provider, ProviderSpec) else provider
    family = name.lower()
    if "tensorrt" in family:
        half = [key for key in ("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable") if settings.get(key) == "1"]
        said = f"lower precision is on: {', '.join(half)}" if half else "no 16- or 8-bit arithmetic was asked for"
        return [f"{said}; TensorRT may use TF32 unless NVIDIA_TF32_OVERRIDE=0 is set"]
    if "cuda" not in family:
        return []
    if settings.get("use_tf32", "1") == "0":
        return ["TF32 is off: float32 products have 23 bits of mantissa (use_tf32=0)"]
    return ["TF32 is on: on Ampere and later, float32 products have 10 bits of mantissa; cuda:use_tf32=0 turns it off"]


@functools.cache
def known_options(name: str) -> tuple[str, ...]:
    """The options that a provider lists, sorted, from a session of one node; empty where it lists none.

    Args:
        name: full name.

    Raises:
        UsageError: the provider does not start.
    """
    spec = ProviderSpec(name=name, session={}, options={})
    session = make_session(_one_node(), spec)
    return tuple(sorted(session.get_provider_options().get(name, {})))


def named(model: str | Path | bytes) -> str:
    """What messages call a model."""
    return "the model in memory" if isinstance(model, bytes) else str(model)


def _check_options(spec: ProviderSpec) -> None:
    known = known_options(spec.name) if spec.options else ()
    for key in spec.options:
        if known and key not in known:
            raise unknown_option(spec.name, key, known)


def _check_denormals(spec: ProviderSpec) -> None:
    """The first session of a process settles it for the calling thread; what later ones ask for is ignored."""
    wanted = spec.session.get("denormals")
    if wanted is not None and (wanted == "zero") != flushes_denormals():
        raise UsageError(
            f"denormals={wanted} is settled by the first session of a process, and an earlier one chose otherwise; "
            f"measure it in a process of its own"
        )


def _created(model: str | bytes, name: str, spec: ProviderSpec, options: Any) -> "InferenceSession":
    """A session on the provider; a plug-in is added by its devices, TensorRT leaves over to CUDA."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # on Windows; elsewhere rsi_deploy/__init__.py did
    built_in = onnxruntime.get_available_providers()
    if short_name(spec.name) in CUDA_FAMILY and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        # enable_fallback=0: neither loading nor a failing run may move to another provider
        if spec.name not in built_in:
            options.add_provider_for_devices(plugin_devices(spec.name), dict(spec.options))
            return onnxruntime.InferenceSession(model, options, enable_fallback=0)
        with warnings.catch_warnings(record=True) as caught:
            chain = _chain(spec, built_in)
            session = onnxruntime.InferenceSession(model, options, providers=chain, enable_fallback=0)
        for warning in caught:
            logger.warning("%s: %s", name, warning.message)
        return session
    except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
        _refuse_option(spec, str(error))
        mend = ""
        if "not support the following ONNX operations" in str(error):  # OpenVINO's words, of 2025.4
            mend = "; older opsets say the same in other operators: export with --opset 20"
        said = " ".join(str(error).split())
        raise ModelError(f"{name}: onnxruntime cannot load it on {spec.name}: {said}{mend}") from error


def _refuse_option(spec: ProviderSpec, said: str) -> None:
    """An option that the provider refused by name is the user's to mend, not the model's."""
    for key, value in spec.options.items():
        if re.search(rf"(unknown|invalid|unrecognized)\b.*\boption\W+{key}\b", said, re.IGNORECASE):
            raise unknown_option(spec.name, key, ())
        if key in said and "option" in said.lower():
            raise UsageError(
                f"--provider {spec}: {short_name(spec.name)} refuses {key}={value}: {said.strip()}"
                f"; leave it out, or give another value"
            )


def _chain(spec: ProviderSpec, built_in: list[str]) -> list[tuple[str, dict[str, str]]]:
    chain = [(spec.name, dict(spec.options))]
    if "tensorrt" in spec.name.lower() and "CUDAExecutionProvider" in built_in:
        device = {"device_id": spec.options["device_id"]} if "device_id" in spec.options else {}
        chain.append(("CUDAExecutionProvider", device))
    return chain


def _one_node() -> bytes:
    """The smallest model with float32 input `x (1,)` and output `y = relu(x)`."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())
