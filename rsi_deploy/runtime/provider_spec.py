"""Parse `NAME:key=value,key=value`: a provider and its options.

    cpu:threads=2,spinning=off              session options, valid for all providers
    cuda:use_tf32=0,enable_cuda_graph=1     provider options, passed to onnxruntime unchanged
    openvino:device_type=HETERO:GPU,CPU     a piece without "=" belongs to the value before it

Session options have short names here, listed in `SESSION_OPTIONS`; any other key is a provider option, which
`sessions.make_session` checks with onnxruntime.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.providers import resolve_provider, short_name

_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "layout": "ORT_ENABLE_LAYOUT",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "disabled": "ORT_DISABLE_ALL",
}
_SWITCH = {"on": True, "1": True, "true": True, "off": False, "0": False, "false": False}


@dataclass(frozen=True, kw_only=True)
class ProviderSpec:
    """A requested provider with its options.

    Attributes:
        name: full name, which this onnxruntime offers.
        session: session option -> value; keys of `SESSION_OPTIONS`, values checked.
        options: provider option -> value in onnxruntime's terms; not checked yet.
    """

    name: str
    session: Mapping[str, str]
    options: Mapping[str, str]

    def __str__(self) -> str:
        """Return the spec as the user would type it, in short names.

        >>> str(parse_provider("CPU:threads=2"))
        'cpu:threads=2'
        """
        pairs = ",".join(f"{key}={value}" for key, value in {**self.session, **self.options}.items())
        return f"{short_name(self.name)}:{pairs}" if pairs else short_name(self.name)

    def apply_(self, options: Any) -> None:
        """Set the session options on an `onnxruntime.SessionOptions`."""
        for key, value in self.session.items():
            SESSION_OPTIONS[key].set_(options, value)


@dataclass(frozen=True, kw_only=True)
class SessionOption:
    """A session option: its values (any number of 1 or more if empty), and a function that sets it."""

    values: tuple[str, ...]
    set_: Callable[[Any, str], None]

    def check(self, key: str, value: str) -> str:
        """Return the value in its usual spelling.

        Raises:
            UsageError: The option does not take the value.
        """
        if not self.values:
            if value.isdigit() and int(value) > 0:
                return str(int(value))
            raise UsageError(f"provider option {key} takes a number of 1 or more, but got {value!r}")
        plain = value.lower()
        if {"on", "off"} <= set(self.values) and plain in _SWITCH:
            plain = "on" if _SWITCH[plain] else "off"
        if plain not in self.values:
            raise UsageError(f"provider option {key} takes {', '.join(self.values)}, but got {value!r}")
        return plain


def _threads(options: Any, value: str) -> None:
    options.intra_op_num_threads = int(value)


def _inter_threads(options: Any, value: str) -> None:
    """Set the threads between operators, which only parallel execution uses."""
    import onnxruntime

    options.inter_op_num_threads = int(value)
    if int(value) > 1:
        options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL


def _spinning(options: Any, value: str) -> None:
    """Set whether idle workers spin: `on` always, `run` until the run ends, `off` never."""
    entry = options.add_session_config_entry
    entry("session.force_spinning_stop", "1" if value == "run" else "0")
    for kind in ("intra_op", "inter_op"):
        entry(f"session.{kind}.allow_spinning", "0" if value == "off" else "1")


def _optimization(options: Any, value: str) -> None:
    import onnxruntime

    level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[value], None)
    if level is None:
        raise UsageError(
            f"optimization={value} is not known to onnxruntime {onnxruntime.__version__}", hint="use extended"
        )
    options.graph_optimization_level = level


def _arena(options: Any, value: str) -> None:
    options.enable_cpu_mem_arena = value == "on"


def _memory_pattern(options: Any, value: str) -> None:
    options.enable_mem_pattern = value == "on"


def _denormals(options: Any, value: str) -> None:
    options.add_session_config_entry("session.set_denormal_as_zero", "1" if value == "zero" else "0")


def _prepacking(options: Any, value: str) -> None:
    options.add_session_config_entry("session.disable_prepacking", "0" if value == "on" else "1")


SESSION_OPTIONS: Mapping[str, SessionOption] = MappingProxyType(
    {
        "threads": SessionOption(values=(), set_=_threads),
        "inter_threads": SessionOption(values=(), set_=_inter_threads),
        "spinning": SessionOption(values=("on", "run", "off"), set_=_spinning),
        "arena": SessionOption(values=("on", "off"), set_=_arena),
        "memory_pattern": SessionOption(values=("on", "off"), set_=_memory_pattern),
        "optimization": SessionOption(values=tuple(_LEVELS), set_=_optimization),
        "denormals": SessionOption(values=("keep", "zero"), set_=_denormals),
        "prepacking": SessionOption(values=("on", "off"), set_=_prepacking),
    }
)


def parse_provider(provider: "str | ProviderSpec") -> ProviderSpec:
    """Parse `NAME[:key=value[,key=value...]]`.

    >>> dict(parse_provider("cpu:threads=2,spinning=false").session)
    {'threads': '2', 'spinning': 'off'}

    Raises:
        UsageError: The provider is unknown, a piece is not `key=value`, a key repeats, or a session option does not
            take its value.
    """
    if isinstance(provider, ProviderSpec):
        return provider
    name = resolve_provider(provider)
    session: dict[str, str] = {}
    options: dict[str, str] = {}
    for key, value in _pairs(provider):
        if key in session or key in options:
            raise UsageError(f"--provider {provider}: {key} is given twice", hint="leave one out")
        if key in SESSION_OPTIONS:
            session[key] = SESSION_OPTIONS[key].check(key, value)
        else:
            options[key] = value
    if options and short_name(name) == "cpu":
        raise unknown_option(name, next(iter(options)), ())
    return ProviderSpec(name=name, session=MappingProxyType(session), options=MappingProxyType(options))


def unknown_option(provider: str, key: str, known: tuple[str, ...]) -> UsageError:
    """Return the error for an unknown option; `known` are the provider's options."""
    text = f"provider option {key!r} does not exist; every provider takes {', '.join(SESSION_OPTIONS)}"
    own = known or _DOCUMENTED.get(short_name(provider), ())
    return UsageError(f"{text}; {short_name(provider)} also takes {', '.join(own)}" if own else text)


def checks_options(provider: str) -> bool:
    """Return whether a provider that lists no options refuses unknown ones, as OpenVINO does."""
    return short_name(provider) in _DOCUMENTED


def _pairs(provider: str) -> list[tuple[str, str]]:
    _, colon, rest = provider.partition(":")
    pieces: list[list[str]] = []
    for piece in rest.split(",") if colon else ():
        key, equals, value = piece.partition("=")
        if equals and key.strip().isidentifier():
            pieces.append([key.strip(), value.strip()])
        elif pieces and piece.strip():
            pieces[-1][1] += f",{piece}"
        else:
            raise UsageError(f"--provider takes NAME:key=value[,key=value], e.g. cpu:threads=2, but got {provider!r}")
    for key, value in pieces:
        if not value:
            raise UsageError(f"--provider {provider}: {key} has no value", hint=f"type {key}=VALUE")
    return [(key, value) for key, value in pieces]


# Only for error messages about providers that check their options but do not list them: onnxruntime's
# openvino_provider_factory.cc, 1.24.
_DOCUMENTED = {
    "openvino": (
        *("device_type", "device_id", "device_luid", "precision", "num_of_threads", "num_streams", "cache_dir"),
        *("load_config", "model_priority", "disable_dynamic_shapes", "enable_qdq_optimizer", "enable_causallm"),
        *("reshape_input", "layout", "enable_opencl_throttling"),
    )
}
