"""What happens in one run of a torch module: calls of its layers, and what their outputs are added to.

    hooks                 x --layer--> y        `called(call, layer, x)`, before
    TorchFunctionMode     y + beside, y += beside, beside += y    `joined(call, beside)`, before
                          any other use of y    `used(call)`

`+`, `+=` and `torch.add` count where both are of one shape; a function that gives y back as it was (Identity, Dropout
in evaluation) is no use of it. Where two layers' outputs meet, the later one is joined to the earlier one, not also
the other way round.
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
    """One call of a site's layers in a run, numbered from 0."""

    site: str
    number: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A module that multiplies by a site's weight when called, and what reads its rows."""

    site: str
    module: nn.Module
    reader: Reader


class Stopped(BaseException):
    """Ends a run that has shown all that was wanted; no Exception, because models catch those."""


class Watch(TorchFunctionMode, ABC):
    """Within it, one run of a module tells what happens to `layers`; tensors are not kept alive.

    Define `called`, and override `joined` and `used` where they matter.
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
        """A layer is about to be called with `x`; say whether to follow its output."""

    def joined(self, call: LayerCall, beside: Tensor) -> None:
        """The output of a call is about to be added to `beside`, of the same shape."""

    def used(self, call: LayerCall) -> None:
        """The output of a call is used otherwise."""

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
        """Run `func`, and tell what it does to the outputs followed."""
        kwargs = kwargs or {}
        followed = [t for t in _tensors((*args, *kwargs.values())) if t in self._outputs] if self._outputs else []
        if not followed:
            return func(*args, **kwargs)
        calls = [self._outputs[t] for t in followed]
        versions = [t._version for t in followed]
        added = _addends(func, args, kwargs)
        if added is not None:
            self._join(followed, calls, added)
        result = func(*args, **kwargs)
        for tensor, call, version in zip(followed, calls, versions, strict=True):
            changed = tensor._version != version
            if added is None and (changed or (result is not tensor and any(True for _ in _tensors((result,))))):
                self.used(call)
            if changed:  # it is the layer's output no longer
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

    def _join(self, followed: Sequence[Tensor], calls: Sequence[LayerCall], added: tuple[Tensor, Tensor]) -> None:
        last = max(calls, key=self._serials.__getitem__)
        for tensor, call in zip(followed, calls, strict=True):
            if call == last:
                self.joined(call, added[1] if tensor is added[0] else added[0])
            else:
                self.used(call)


@contextmanager
def overridden(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it, these modules compute something else; afterwards they are as they were."""
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
    """Within it, attentions call their layers, and torch takes no fused path that would not."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with overridden({dense: attention.forward for dense, attention in attentions.items()}):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among values and in the lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (inner for inner in value if isinstance(inner, Tensor))


def _addends(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two tensors of one shape that `func` adds, or None where it does anything else."""
    if getattr(func, "__name__", "") not in ADDITIONS:
        return None
    terms = (*args, *kwargs.values())  # more than two: a scale, or a place for the result
    if len(terms) != 2 or not all(isinstance(t, Tensor) for t in terms) or terms[0].shape != terms[1].shape:
        return None
    return terms[0], terms[1]
