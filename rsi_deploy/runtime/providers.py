"""The execution providers of the installed onnxruntime, by short names.

    built in    listed by `onnxruntime.get_available_providers()`
    plug-in     an installed package `onnxruntime-ep-*`: its module returns a library (`get_library_path()`), which is
                registered in onnxruntime; `onnxruntime.get_ep_devices()` lists the devices it supports

Plug-ins are loaded only if a requested provider is not built in, or to list all providers.
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
_ALIASES = {"gpu": "cuda", "trt": "tensorrt", "directml": "dml"}  # alias -> onnxruntime's name


def available_providers() -> list[str]:
    """Return the full names of the available providers, built in or as plug-ins, best first."""
    return list(dict.fromkeys(_built_in() + [device.ep_name for device in plugin_devices()]))


def plugin_devices(provider: str | None = None) -> list[Any]:
    """Return the `onnxruntime.OrtEpDevice`s of all providers or of one, after registering the plug-ins."""
    import onnxruntime

    register_plugins()
    devices: list[Any] = getattr(onnxruntime, "get_ep_devices", list)()  # onnxruntime before 1.23 has no plug-ins
    return [device for device in devices if provider in (None, device.ep_name)]


@functools.cache
def register_plugins() -> Mapping[str, str]:
    """Register the library of every installed package `onnxruntime-ep-*`, once per process.

    Returns:
        Module -> reason why it could not be registered, or "".
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
        except Exception as error:  # a broken plug-in can raise anything and must not affect the others
            found[module.name] = str(error) or type(error).__name__
            logger.warning("%s cannot be registered: %s", _distribution(module.name), found[module.name])
    return MappingProxyType(found)


def short_name(provider: str) -> str:
    """Return the short name of a provider, as on the command line.

    >>> short_name("CUDAExecutionProvider")
    'cuda'
    """
    return provider.removesuffix(_SUFFIX).lower()


def short_name_of_user(name: str) -> str:
    """Return the short name for a user's spelling: any case, full or short, aliases resolved, without options.

    >>> short_name_of_user("GPU"), short_name_of_user("cudaexecutionprovider"), short_name_of_user("cpu:threads=1")
    ('cuda', 'cuda', 'cpu')
    """
    short = name.partition(":")[0].strip().lower().removesuffix(_SUFFIX.lower())
    return _ALIASES.get(short, short)


def resolve_provider(name: str) -> str:
    """Return the full name of a provider such as `cpu`, `cuda:device_id=1` or `CUDAExecutionProvider`, in any case.

    Raises:
        UsageError: It is not available; the message lists the available ones and what to install.
    """
    short = short_name_of_user(name)
    for provider in _built_in():
        if short_name(provider) == short:
            return provider
    names = available_providers()
    for provider in names:
        if short_name(provider) == short:
            return provider
    raise UsageError(
        f"provider {name!r} is not offered by the installed onnxruntime",
        hint=f"available: {', '.join(short_name(provider) for provider in names)}. {install_hint(short)}",
    )


def install_hint(short: str) -> str:
    """Say what is installed, and what to type to make the provider with this short name available."""
    installed = [f"{name} {version}" for name, version in onnxruntime_distributions().items()]
    state = f"Installed: {', '.join(installed) or 'no onnxruntime distribution'}."
    if len(installed) > 1:
        state += " They overwrite each other's files: uninstall all of them, then install one."
    for module, problem in register_plugins().items():
        if short in module.replace("_", ""):
            result = f"cannot be loaded: {problem}" if problem else "loads, but finds no device on this machine"
            state += f" The plug-in {_distribution(module)} is installed and {result}."
    if short in ("cuda", "tensorrt"):
        return f"{state} For {short}: pip uninstall onnxruntime && pip install onnxruntime-gpu"
    if short == "openvino":
        return (
            f"{state} For openvino on any x86 CPU: pip install onnxruntime-openvino in a separate environment "
            f"(it overwrites onnxruntime's folder); on Intel hardware also pip install onnxruntime-ep-openvino"
        )
    return (
        f"{state} Providers come with a special onnxruntime package (onnxruntime-{short}) "
        f"or as a plug-in (onnxruntime-ep-{short})."
    )


def _built_in() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _distribution(module: str) -> str:
    return module.replace("_", "-")
