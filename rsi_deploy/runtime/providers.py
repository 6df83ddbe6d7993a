"""Which execution providers the installed onnxruntime offers, found at run time, by their short names.

    built in    what `onnxruntime.get_available_providers()` says
    plug-in     every installed package `onnxruntime-ep-*`: its module names its library (`get_library_path()`),
                onnxruntime registers it, and `onnxruntime.get_ep_devices()` says what it can run on here

Plug-ins are loaded only when a provider is asked for that is not built in, or when all are listed.
"""

import functools
import importlib
import logging
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.machine import onnxruntime_distributions

logger = logging.getLogger(__name__)

_SUFFIX = "ExecutionProvider"
_PLUGIN_PREFIX = "onnxruntime_ep_"
_ALIASES = {"gpu": "cuda", "trt": "tensorrt", "directml": "dml"}  # what people type -> onnxruntime's word


def available() -> list[str]:
    """Full names of the providers this onnxruntime offers, built in or as plug-ins, best first."""
    return list(dict.fromkeys(_built_in() + [device.ep_name for device in plugin_devices()]))


def plugin_devices(provider: str | None = None) -> list[Any]:
    """The `onnxruntime.OrtEpDevice`s of all providers, or of one, after every installed plug-in was registered."""
    import onnxruntime

    register_plugins()
    devices: list[Any] = getattr(onnxruntime, "get_ep_devices", list)()  # onnxruntime before 1.23 has no plug-ins
    return [device for device in devices if provider in (None, device.ep_name)]


@functools.cache
def register_plugins() -> Mapping[str, str]:
    """Register the library of every installed package `onnxruntime-ep-*`, once a process.

    Returns:
        Module -> the reason why it could not be registered, or "" where it was.
    """
    import onnxruntime

    found: dict[str, str] = {}
    for module in pkgutil.iter_modules():
        if not module.name.startswith(_PLUGIN_PREFIX):
            continue
        try:
            path = importlib.import_module(module.name).get_library_path()
            onnxruntime.register_execution_provider_library(f"rsi-deploy.{module.name}", path)
            found[module.name] = ""
        except Exception as error:  # a broken plug-in fails in any way it likes, and must not stop the others
            found[module.name] = str(error) or type(error).__name__
            logger.warning("%s cannot be registered: %s", _distribution(module.name), found[module.name])
    return MappingProxyType(found)


def short_name(provider: str) -> str:
    """What the command line calls a provider.

    >>> short_name("CUDAExecutionProvider")
    'cuda'
    """
    return provider.removesuffix(_SUFFIX).lower()


def short_name_of_user(name: str) -> str:
    """What a user typed as a short name: any case, full or short, aliases resolved, options left out.

    >>> short_name_of_user("GPU"), short_name_of_user("cudaexecutionprovider"), short_name_of_user("cpu:threads=1")
    ('cuda', 'cuda', 'cpu')
    """
    wanted = name.partition(":")[0].strip().lower().removesuffix(_SUFFIX.lower())
    return _ALIASES.get(wanted, wanted)


def resolve(name: str) -> str:
    """The full name of a provider given as `cpu`, `cuda:device_id=1`, `CUDAExecutionProvider`..., in any case.

    Raises:
        UsageError: this onnxruntime does not offer it; names those it offers and what to install.
    """
    wanted = short_name_of_user(name)
    for provider in _built_in():
        if short_name(provider) == wanted:
            return provider
    names = available()
    for provider in names:
        if short_name(provider) == wanted:
            return provider
    raise UsageError(
        f"provider {name!r} is not offered by the installed onnxruntime; available: "
        f"{', '.join(short_name(provider) for provider in names)}. {install_hint(wanted)}"
    )


def install_hint(wanted: str) -> str:
    """What is installed, and what to type so that the provider with this short name becomes available."""
    installed = [f"{name} {version}" for name, version in onnxruntime_distributions().items()]
    state = f"Installed: {', '.join(installed) or 'no onnxruntime distribution'}."
    if len(installed) > 1:
        state += " They overwrite each other's files: uninstall all of them, then install one."
    for module, problem in register_plugins().items():
        if wanted in module.replace("_", ""):
            said = f"cannot be loaded: {problem}" if problem else "loads, but shows no device on this machine"
            state += f" The plug-in {_distribution(module)} is installed and {said}."
    if wanted in ("cuda", "tensorrt"):
        return f"{state} For {wanted}: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    if wanted == "openvino":
        return (
            f"{state} For openvino on any x86 CPU: an environment of its own with pip install onnxruntime-openvino "
            f"(it overwrites onnxruntime's folder); on Intel hardware also pip install onnxruntime-ep-openvino"
        )
    return (
        f"{state} Providers come with the onnxruntime package that was built for them (onnxruntime-{wanted}) "
        f"or as a plug-in (onnxruntime-ep-{wanted})."
    )


def _built_in() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _distribution(module: str) -> str:
    return module.replace("_", "-")
