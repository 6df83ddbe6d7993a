"""Weights that torch layers compute from other tensors at every call, and their conversion to ordinary parameters.

    weight_norm     weight_g, weight_v --> weight        torch.nn.utils.weight_norm, torch.nn.utils.parametrizations
    spectral_norm   weight_orig, u, v  --> weight        the same two
    pruning         weight_orig, mask  --> weight        torch.nn.utils.prune
    any other `torch.nn.utils.parametrize` parametrization

Only a value can be factorized. Before a split, the layer is therefore folded: it keeps the value of evaluation mode
as a parameter, and the computation is removed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm, weight_norm

_WEIGHT_NORM: Any = weight_norm.__globals__["WeightNorm"]
_SPECTRAL_NORM: Any = spectral_norm.__globals__["SpectralNorm"]


def computed_tensors(layer: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """Return the names of the tensors that `layer` computes at every call, each with its source tensors."""
    found: dict[str, tuple[Tensor, ...]] = {}
    if parametrize.is_parametrized(layer):
        for name, steps in layer.parametrizations.items():  # type: ignore[operator,union-attr]
            found[name] = (*steps.parameters(recurse=False), *steps.buffers(recurse=False))
    for hook in layer._forward_pre_hooks.values():
        if (name := _tensor_of(hook)) is not None:
            keys = [key for key in layer._parameters if key.startswith(f"{name}_")]
            found[name] = tuple(p for key in keys if (p := layer._parameters[key]) is not None)
    return found


@torch.no_grad()
def value_of(layer: nn.Module, name: str) -> Tensor:
    """Return the value of a computed tensor of `layer` in evaluation mode, without changing the layer."""
    for hook in layer._forward_pre_hooks.values():
        if _tensor_of(hook) == name:
            return _computed_by(hook, layer).detach().clone()
    steps: Any = layer.parametrizations
    with _evaluation(steps[name]):
        value: Tensor = getattr(layer, name)
    return value.detach().clone()


def fold_computed_(layer: nn.Module) -> None:
    """Make every computed tensor of `layer` an ordinary parameter of the same value, in place.

    A recurrent layer under `parametrize` is not changed: torch's recurrent kernels do not use its computed tensors.
    """
    if isinstance(layer, nn.RNNBase) and parametrize.is_parametrized(layer):
        return
    computed = computed_tensors(layer)
    values = {name: value_of(layer, name) for name in computed}
    for place, hook in list(layer._forward_pre_hooks.items()):
        if _tensor_of(hook) in values:
            del layer._forward_pre_hooks[place]
    if parametrize.is_parametrized(layer) and computed:
        original = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = original  # torch's own removal would edit the class, which copies of the layer share
    for name, sources in computed.items():
        layer.__dict__.pop(name, None)
        for key in [key for key in (*layer._parameters, *layer._buffers) if key in _source_keys(name)]:
            delattr(layer, key)
        is_trained = any(source.requires_grad for source in sources)
        setattr(layer, name, nn.Parameter(values[name], requires_grad=is_trained))


def folded(module: nn.Module) -> nn.Module:
    """Return a copy of `module` with all computed tensors folded, or `module` itself if it has none.

    The copy shares all other tensors with `module`, which is not changed.
    """
    if not any(computed_tensors(layer) for layer in module.modules()):
        return module
    copies: dict[nn.Module, nn.Module] = {}

    def copied(layer: nn.Module) -> nn.Module:
        if layer not in copies:
            copies[layer] = new = object.__new__(type(layer))
            new.__dict__ = {key: _shallow(value) for key, value in layer.__dict__.items()}
            new._modules = {name: None if child is None else copied(child) for name, child in layer._modules.items()}
            fold_computed_(new)
        return copies[layer]

    return copied(module)


def _source_keys(name: str) -> set[str]:
    return {f"{name}_{end}" for end in ("g", "v", "orig", "u", "mask")}


def _tensor_of(hook: Callable[..., Any]) -> str | None:
    """Return the name of the tensor that a hook of torch computes, or None for any other hook."""
    if isinstance(hook, _WEIGHT_NORM | _SPECTRAL_NORM):
        return str(hook.name)
    return hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else None


def _computed_by(hook: Any, layer: nn.Module) -> Tensor:
    if isinstance(hook, _SPECTRAL_NORM):
        value = hook.compute_weight(layer, do_power_iteration=False)
    elif isinstance(hook, _WEIGHT_NORM):
        value = hook.compute_weight(layer)
    else:
        value = hook.apply_mask(layer)
    assert isinstance(value, Tensor)
    return value


def _shallow(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Set evaluation mode, because a spectral norm in training mode iterates at every access."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
