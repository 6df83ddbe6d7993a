"""The hidden units of a torch module: found in its ONNX graph, and removed from its layers in place.

    module --to_graph--> graph --survey--> units, and the axis of each parameter that holds entries of them
    trial                every second unit is removed; the outputs must be those with zeros in what reads the others

The code of a module may want a fixed number of units (`x.view(-1, 512)`): the trial finds that out before anything is
planned. A module that cannot be exported has no hidden units, and neither has a layer that fails the trial.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graph_passes as gp
from graph_passes.hidden_units import UnitAxis, hidden_units
from graph_passes.names import name_of
from graph_passes.weights import Weight
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.sites import site_name
from rsi_deploy.torch_models.layers import changed_bias
from rsi_deploy.torch_models.to_onnx import to_graph

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModuleUnits:
    """The hidden units that a layer reads, and the tensors that hold entries of them.

    Attributes:
        reader: path of the layer, which is the name of its site.
        units: what a planner needs to know; makers and nodes are names of sites.
        macs: multiply-accumulates per sample of the sites between.
        cuts: names of parameters and buffers -> the axis with the entries of each unit; the reader's weight among them.
    """

    reader: str
    units: gp.Units
    macs: int
    cuts: Mapping[str, UnitAxis]


def find_module_units(
    module: nn.Module, batch: tuple[Any, ...], macs: Mapping[str, int] | None = None
) -> dict[str, ModuleUnits]:
    """Return the hidden units of a module by the name of the site that reads them; {} if it cannot be exported.

    Args:
        module: module in evaluation mode; not changed.
        batch: its positional arguments.
        macs: multiply-accumulates per sample, by site name.
    """
    try:
        model = to_graph(module, batch)
    except Exception as error:  # tracing runs the module's own code, which may raise anything
        logger.info("no hidden units: %s cannot be exported: %s", type(module).__name__, error)
        return {}
    found = {each.reader: each for each in _units_of(module, model, macs or {})}
    if _answers_alike(module, batch, list(found.values())):
        return found
    return {name: each for name, each in found.items() if _answers_alike(module, batch, [each])}


def keep_units_(module: nn.Module, found: ModuleUnits, replacement: Replacement) -> None:
    """Remove the units that a replacement in the form "units" leaves out, and give their reader its weight, in place.

    Every layer stays the same object, with smaller parameters.
    """
    run = found.units.run
    kept = replacement.right[0].argmax(dim=1)[::run] // run
    _cut_(module, found.cuts, kept)
    layer, left = module.get_submodule(found.reader), replacement.left[0]
    old, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert old is not None
    left = left.reshape(len(old), -1, left.shape[-1])  # (out, points, kept)
    weight = left.mT.reshape(old.shape).to(old).contiguous()  # strides of a Conv's weight would pass to its output
    layer._parameters["weight"] = nn.Parameter(weight, requires_grad=old.requires_grad)
    change = replacement.bias.reshape(-1).to(old) if replacement.bias.any() else None
    layer._parameters["bias"] = changed_bias(bias, change)


def _units_of(module: nn.Module, model: ir.Model, macs: Mapping[str, int]) -> Iterator[ModuleUnits]:
    """Yield the hidden units of the graph of a module whose tensors are all known."""
    nodes = {name_of(node): node for node in model.graph}
    tensors = _tensors_of(module)
    owners = Counter(id(tensor) for tensor in tensors.values())
    for site in gp.find_sites(model):
        if not isinstance(site, gp.Site) or site.units is None or site.units.form != "units":
            continue
        found = hidden_units(nodes[site.node], site.units.count * site.units.run)
        reader = site_name(site.weight)
        cuts, numbers = {}, Counter[str]()
        try:
            if not isinstance(layer := module.get_submodule(reader), nn.Linear | nn.modules.conv._ConvNd):
                raise _DoubtError(f"it is a {type(layer).__name__}")
            for weight, axis in found.constants.values():
                if weight.name in tensors:
                    cuts[weight.name] = _axis_in(tensors[weight.name], weight, axis)
                elif np.ptp(weight.numpy()):  # equal numbers are made in any size, such as the bias of a Conv without
                    raise _DoubtError(f"{weight.name!r} is no parameter")
            for name in (*cuts, site.weight):
                _check_owner(module, name)
                if owners[id(tensors[name])] > 1:
                    raise _DoubtError(f"{name!r} is tied")
        except (_DoubtError, AttributeError, LookupError) as reason:
            logger.info("%s has no hidden units: %s", reader, reason)
            continue
        for name in cuts:
            if isinstance(tensors[name], nn.Parameter):
                numbers[name] = tensors[name].numel() // site.units.count
        products = [found.constants[node, 1][0].name for node in (*found.makers, *found.between)]
        makers, between = products[: len(found.makers)], products[len(found.makers) :]
        units = gp.Units(
            count=site.units.count,
            run=site.units.run,
            makers=tuple(map(site_name, makers)),
            nodes=tuple(map(site_name, products)),
            numbers=numbers.total(),
            beside=numbers.total() - sum(numbers[name] for name in makers),
        )
        yield ModuleUnits(
            reader=reader,
            units=units,
            macs=sum(macs.get(site_name(name), 0) for name in between),
            cuts=cuts | {site.weight: UnitAxis(1, site.units.run)},
        )


class _DoubtError(Exception):
    """Says why units of the graph cannot be removed from the module."""


def _check_owner(module: nn.Module, name: str) -> None:
    """Refuse the tensors of layers that have other sizes to change."""
    path = name.rpartition(".")[0]
    for layer in (module.get_submodule(path), module.get_submodule(path.rpartition(".")[0])):
        if isinstance(layer, nn.MultiheadAttention | nn.RNNBase):
            raise _DoubtError(f"{name!r} belongs to a {type(layer).__name__}")


def _axis_in(tensor: Tensor, weight: Weight, axis: UnitAxis) -> UnitAxis:
    """Return the axis of a tensor that is an axis of the same tensor in the graph, which may have more sizes of 1."""
    stored = [int(size) for size in weight.tensor.shape.numpy()]
    own = [place for place, size in enumerate(tensor.shape) if size != 1]
    if [size for size in stored if size != 1] != [tensor.shape[place] for place in own]:
        raise _DoubtError(f"{weight.name!r} has another layout in the graph")
    return UnitAxis(own[sum(size != 1 for size in stored[: axis.number])], axis.run)


def _answers_alike(module: nn.Module, batch: tuple[Any, ...], some: Sequence[ModuleUnits]) -> bool:
    """Return whether the module without every second unit computes what it computes with zeros in their readers."""
    try:
        with torch.no_grad(), _restored(module, some):
            for each in some:
                _mute_(module, each)
            expected = _outputs(module, batch)
            for each in some:
                _cut_(module, each.cuts, _odd(each))
            outputs = _outputs(module, batch)
    except Exception as error:  # code of the module with other sizes than it was written for
        logger.info("no hidden units at %s: %s", ", ".join(each.reader for each in some), error)
        return False
    is_alike = len(outputs) == len(expected) > 0 and all(map(_is_near, outputs, expected))
    if not is_alike:
        logger.info("no hidden units at %s: the outputs change", ", ".join(each.reader for each in some))
    return is_alike


def _outputs(module: nn.Module, batch: tuple[Any, ...]) -> list[Tensor]:
    leaves = pytree.tree_leaves(module(*batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()]


def _is_near(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal but for rounding; False for any NaN."""
    if one.shape != other.shape:
        return False
    bound = torch.finfo(one.dtype).eps ** 0.5 * other.abs().max()
    return bool((one - other).abs().max() <= bound)


def _odd(found: ModuleUnits) -> Tensor:
    return torch.arange(1, found.units.count, 2)


def _mute_(module: nn.Module, found: ModuleUnits) -> None:
    """Set a reader's weights for the units with even numbers to zero."""
    layer = module.get_submodule(found.reader)
    axis = found.cuts[f"{found.reader}.weight"]
    weight = layer._parameters["weight"]
    assert weight is not None
    even = torch.from_numpy(axis.entries(np.arange(0, found.units.count, 2))).to(weight.device)
    layer._parameters["weight"] = nn.Parameter(weight.index_fill(axis.number, even, 0))


def _cut_(module: nn.Module, cuts: Mapping[str, UnitAxis], kept: Tensor) -> None:
    """Keep the entries of some units in every tensor, and set the sizes that its layer has."""
    for name, axis in cuts.items():
        path, _, key = name.rpartition(".")
        layer = module.get_submodule(path)
        held: dict[str, Any] = layer._parameters if key in layer._parameters else layer._buffers
        old = held[key]
        places = torch.from_numpy(axis.entries(kept.cpu().numpy())).to(old.device)
        new = old.detach().index_select(axis.number, places)
        held[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        _set_sizes_(layer)


def _set_sizes_(layer: nn.Module) -> None:
    """Set the sizes of a layer to those of its tensors."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:  # depthwise
        layer.groups = layer.in_channels = layer.out_channels = len(layer.weight)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = next(len(t) for t in (layer.running_mean, layer.weight) if t is not None)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()


@contextmanager
def _restored(module: nn.Module, some: Sequence[ModuleUnits]) -> Iterator[None]:
    """Give the layers their tensors and sizes back at the end."""
    layers = {module.get_submodule(name.rpartition(".")[0]) for each in some for name in each.cuts}
    before = {
        layer: {k: dict(v) if k in ("_parameters", "_buffers") else v for k, v in layer.__dict__.items()}
        for layer in layers
    }
    try:
        yield
    finally:
        for layer, attributes in before.items():
            layer.__dict__.clear()
            layer.__dict__.update(attributes)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
