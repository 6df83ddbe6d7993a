"""Inference calls with preallocated inputs and outputs, for timing.

    inputs      copied to the provider's device once, before the timing
    outputs     allocated once, with the shapes of an untimed run, so that a timed call allocates nothing
    call        `run_with_iobinding`; on a device followed by `synchronize_outputs`, so that the time includes the work
                and not only its launch

So the time excludes copies to and from a device. Copies that onnxruntime inserts *inside* the graph are counted in
`placement.Placement.memcpy_nodes`. A model with an input or output that is not a tensor of numbers (text, a sequence, a
map) cannot be bound: it is called through `session.run`, and `Bound.how` says so.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.runtime.feeds.values import is_text
from rsi_deploy.runtime.provider_spec import ProviderSpec, parse_provider
from rsi_deploy.runtime.providers import short_name
from rsi_deploy.runtime.sessions import CUDA_FAMILY

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_GRAPH_OPTIONS = ("enable_cuda_graph", "trt_cuda_graph_enable")
_NO_GRAPH = -1
_graphs = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class TensorDevice:
    """Device of tensors in onnxruntime's terms: `cpu` or `cuda`, and its number."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.number}"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A session with bound inputs and outputs.

    Attributes:
        call: runs one inference and returns when its outputs are complete.
        device: device of inputs and outputs.
        how: description for the report.
        outputs: returns the outputs of the last call, copied to host memory.
    """

    call: Callable[[], None]
    device: TensorDevice
    how: str
    outputs: Callable[[], list[Array]]


def bound_call(session: "InferenceSession", feeds: Feeds, provider: str | ProviderSpec = "cpu") -> Callable[[], None]:
    """Return `bind(...).call`, the function that a timing loop calls."""
    return bind(session, feeds, provider).call


def bind(session: "InferenceSession", feeds: Feeds, provider: str | ProviderSpec = "cpu") -> Bound:
    """Bind the inputs, run once for the outputs' shapes, bind outputs of those shapes, and run again.

    Args:
        session: session of the model.
        feeds: input name -> array that fits.
        provider: provider of the session.

    Raises:
        ModelError: The run fails; the message includes onnxruntime's.
        UsageError: A CUDA graph is requested, but the model cannot be bound.
    """
    import onnxruntime

    spec = parse_provider(provider)
    device = device_of(spec, session.get_providers())
    graph = _graph_option(spec)
    texts = [name for name, array in feeds.items() if is_text(array.dtype)]
    if unbindable := texts + [value.name for value in session.get_outputs() if not _can_be_bound(value.type)]:
        if graph:
            raise UsageError(
                f"{graph}=1 needs inputs and outputs that are tensors of numbers, but {unbindable[0]} is not one",
                hint=f"run it with {graph}=0",
            )
        return _unbound(session, feeds)
    names = [output.name for output in session.get_outputs()]
    try:
        inputs = [on_device(array, device) for array in feeds.values()]
        # New tensors: OpenVINO 1.24 crashes if the outputs of the first run are bound again.
        first = _first_run(session, dict(zip(feeds, inputs, strict=True)), names, device)
        outputs = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                value.shape(), value.element_type(), device.kind, device.number
            )
            for value in first
        ]
        binding = session.io_binding()
        for name, value in zip(feeds, inputs, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(names, outputs, strict=True):
            binding.bind_ortvalue_output(name, value)
        run_options = _graph_options(next(_graphs)) if graph else None
        session.run_with_iobinding(binding, run_options)
        binding.synchronize_outputs()
    except Exception as error:  # onnxruntime's exceptions have no narrower base class
        raise ModelError(
            f"the run with bound inputs and outputs failed on {device}: {str(error).strip()}",
            hint="rsi-deploy doctor lists what works here",
        ) from error
    return Bound(
        call=_BoundRun(session, binding, run_options, device, (*inputs, *outputs)),
        device=device,
        how=_description(device, graph),
        outputs=lambda: [np.asarray(value.numpy()) for value in outputs],
    )


def device_of(spec: ProviderSpec, started: Sequence[str]) -> TensorDevice:
    """Return the device for a provider's inputs: a CUDA device for the CUDA family, else host memory.

    Args:
        spec: requested provider.
        started: providers of the session; a provider that did not start (an allowed fallback) needs host memory.
    """
    if spec.name not in started or short_name(spec.name) not in CUDA_FAMILY:
        return TensorDevice(kind="cpu")
    number = spec.options.get("device_id", "0")
    if not number.isdigit():
        raise UsageError(f"--provider {spec}: device_id takes a number of 0 or more, but got {number!r}")
    return TensorDevice(kind="cuda", number=int(number))


def on_device(array: Array, device: TensorDevice) -> Any:
    """Return an `onnxruntime.OrtValue` with a copy of the array, or on the host with the array itself."""
    from onnxruntime import OrtValue

    contiguous = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes a scalar (1,)
    if array.dtype.kind == "V":  # bfloat16 and others of ml_dtypes, which are not numpy types
        from onnx.helper import np_dtype_to_tensor_dtype

        if device.kind != "cpu":
            raise UsageError(
                f"{array.dtype} inputs cannot be bound to {device}", hint="take a model with float16 inputs"
            )
        return OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, np_dtype_to_tensor_dtype(array.dtype))
    return OrtValue.ortvalue_from_numpy(contiguous, device.kind, device.number)


def _first_run(session: Any, inputs: Mapping[str, Any], names: Sequence[str], device: TensorDevice) -> list[Any]:
    """Run once with outputs that onnxruntime allocates, without capturing a CUDA graph; only their shapes are used."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for name in names:
        binding.bind_output(name, device.kind, device.number)
    binding.synchronize_inputs()
    session.run_with_iobinding(binding, None if device.kind == "cpu" else _graph_options(_NO_GRAPH))
    binding.synchronize_outputs()
    return list(binding.get_outputs())


def _graph_options(number: int) -> Any:
    """Return run options with the number of the CUDA graph to capture and replay; each binding has its own graph."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


class _BoundRun:
    """One inference. It keeps the bound values alive, because a binding refers to host arrays only by address."""

    __slots__ = ("_binding", "_kept", "_options", "_run", "_synchronize")

    def __init__(self, session: Any, binding: Any, options: Any, device: TensorDevice, kept: tuple[Any, ...]):
        self._run, self._binding, self._options, self._kept = session.run_with_iobinding, binding, options, kept
        self._synchronize = None if device.kind == "cpu" else binding.synchronize_outputs

    def __call__(self) -> None:
        self._run(self._binding, self._options)
        if self._synchronize is not None:
            self._synchronize()


def _can_be_bound(type_name: str) -> bool:
    return type_name.startswith("tensor(") and type_name != "tensor(string)"


def _unbound(session: Any, feeds: Feeds) -> Bound:
    last: list[list[Any]] = [[]]
    fed = dict(feeds)

    def call() -> None:
        last[0] = session.run(None, fed)

    return Bound(
        call=call,
        device=TensorDevice(kind="cpu"),
        how="plain session.run, as an input or output is not a tensor of numbers: allocation and copies are timed too",
        outputs=lambda: last[0],
    )


def _graph_option(spec: ProviderSpec) -> str:
    """Return the option that enables a CUDA graph, or ""."""
    on = [key for key in _GRAPH_OPTIONS if spec.options.get(key, "0").lower() in ("1", "true")]
    return on[0] if on else ""


def _description(device: TensorDevice, graph: str) -> str:
    if device.kind == "cpu":
        return "inputs and outputs bound in host memory before the timing"
    text = f"inputs and outputs bound on {device} before the timing, copies left out, each call synchronised"
    return f"{text}; replayed as a CUDA graph ({graph}=1)" if graph else text
