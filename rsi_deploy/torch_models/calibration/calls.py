"""Observe one run of a torch module: the calls of its layers, and the tensors that their outputs are added to.

    hooks                 x --layer--> y                          `called(call, layer, x)` before it
    TorchFunctionMode     y + other, y += other, other += y       `added(call, other)` before it
                          any other use of y                      `used(call)`

Additions are `+`, `+=` and `torch.add` of two tensors of one shape. A function that returns y unchanged (Identity, or
Dropout in evaluation mode) is not a use. If the outputs of two layers are added, only the later one counts as added.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from rsi_deploy.torch_models.calibration.rows import Reader
from rsi_deploy.torch_models.layers import OpenMultiheadAttention

ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class LayerCall(NamedTuple):
    """One call of a site's layers in a run; calls are numbered from 0."""

    site: str
    number: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A module that multiplies by a site's weight, with the reader of its rows."""

    site: str
    module: nn.Module
    reader: Reader


class Stopped(BaseException):
    """Ends a run early. It is no Exception, because models may catch those."""


class Watch(TorchFunctionMode, ABC):
    """A context that observes `layers` in one run of a module without keeping tensors alive.

    Subclasses define `called`, and override `added` and `used` if they need them.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self._layers = layers
        self._handles: list[RemovableHandle] = []
        self._numbers: Counter[str] = Counter()
        self._serials: dict[LayerCall, int] = {}
        self._outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @abstractmethod
    def called(self, call: LayerCall, layer: Layer, x: Tensor) -> bool:
        """Handle a layer that is about to be called with `x`; return whether to follow its output."""

    def added(self, call: LayerCall, other: Tensor) -> None:
        """Handle the output of a call that is about to be added to `other`, of the same shape."""

    def used(self, call: LayerCall) -> None:
        """Handle any other use of the output of a call."""

    def __enter__(self) -> "Watch":
        for layer in self._layers:
            self._hook(layer)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        while self._handles:
            self._handles.pop().remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, and report its uses of the followed outputs."""
        kwargs = kwargs or {}
        followed = [t for t in _tensors((*args, *kwargs.values())) if t in self._outputs] if self._outputs else []
        if not followed:
            return func(*args, **kwargs)
        calls = [self._outputs[t] for t in followed]
        versions = [t._version for t in followed]
        addends = _addends(func, args, kwargs)
        if addends is not None:
            self._report_addition(followed, calls, addends)
        result = func(*args, **kwargs)
        for tensor, call, version in zip(followed, calls, versions, strict=True):
            changed = tensor._version != version
            if addends is None and (changed or (result is not tensor and any(True for _ in _tensors((result,))))):
                self.used(call)
            if changed:  # it is no longer the layer's output
                self._outputs.pop(tensor, None)  # type: ignore[no-untyped-call]
        return result

    def _hook(self, layer: Layer) -> None:
        follow: list[LayerCall] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = LayerCall(layer.site, self._numbers[layer.site])
            self._numbers[layer.site] += 1
            follow.clear()
            if self.called(call, layer, args[0] if args else next(iter(kwargs.values()))):
                follow.append(call)

        def behind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            for call in follow:
                self._serials[call] = len(self._serials)
                self._outputs[output] = call

        self._handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(layer.module.register_forward_hook(behind))

    def _report_addition(
        self, followed: Sequence[Tensor], calls: Sequence[LayerCall], addends: tuple[Tensor, Tensor]
    ) -> None:
        last = max(calls, key=self._serials.__getitem__)
        for tensor, call in zip(followed, calls, strict=True):
            if call == last:
                self.added(call, addends[1] if tensor is addends[0] else addends[0])
            else:
                self.used(call)


@contextmanager
def overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules, and restore it at the end."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


@contextmanager
def opened(attentions: Mapping[nn.Module, OpenMultiheadAttention]) -> Iterator[None]:
    """Make attentions call their layers, and turn off the fused paths of torch that would not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with overridden({dense: attention.forward for dense, attention in attentions.items()}):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the values and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (inner for inner in value if isinstance(inner, Tensor))


def _addends(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the two tensors of one shape that `func` adds, or None for any other function."""
    if getattr(func, "__name__", "") not in ADDITIONS:
        return None
    terms = (*args, *kwargs.values())  # a third argument is a scale or an output tensor
    if len(terms) != 2 or not all(isinstance(t, Tensor) for t in terms) or terms[0].shape != terms[1].shape:
        return None
    return terms[0], terms[1]
