"""The layers of a torch module that can become low-rank, and their replacement in place.

nn.Linear, transformers' Conv1D      -> LowRankLinear
nn.Conv1d / 2d / 3d (with groups)    -> LowRankConv
nn.MultiheadAttention, packed        -> LowRankMultiheadAttention (in_proj), LowRankLinear (out_proj)

In the form "pivoted", PivotedLinear, PivotedConv and PivotedMultiheadAttention take their place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from graph_passes.forms import FOLDED, Form, conv_forms
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.sites import site_name
from rsi_deploy.linalg.pivoting import RUN_BOUND, PivotedFactors, pivoted
from rsi_deploy.linalg.solver import Factors, balanced
from rsi_deploy.torch_models.computed_weights import computed_tensors, fold_computed_, value_of
from rsi_deploy.torch_models.layers import (
    LowRankConv,
    LowRankLinear,
    LowRankMultiheadAttention,
    PivotedConv,
    PivotedLinear,
    PivotedMultiheadAttention,
    changed_bias,
)

FACTOR_KEYS = {"left", "right", "in_proj_left", "in_proj_right", "in_proj.left", "in_proj.right"}


@dataclass(frozen=True, kw_only=True)
class ModuleSite:
    """One weight of a module tree, and every layer that uses it.

    Attributes:
        weight: name of the parameter.
        kind: type of the layer.
        parameter: the weight.
        paths: paths of the layers that use it; several for a tied weight.
        obstacle: reason why it cannot be split; "" if it can.
        groups: groups of a Conv; 1 for other layers.
    """

    weight: str
    kind: str
    parameter: nn.Parameter
    paths: tuple[str, ...]
    obstacle: str = ""
    groups: int = 1

    @property
    def name(self) -> str:
        """The name of the site in reports and filters."""
        return site_name(self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, per group."""
        if self.kind == "Conv1D":  # transformers stores (in, out)
            return self.parameter.shape[1], self.parameter.shape[0]
        return self.parameter.shape[0] // self.groups, self.parameter.shape[1:].numel()

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size of a Conv; () for a matrix product."""
        return tuple(self.parameter.shape[2:])

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that a split can take, the usual one first."""
        usual: tuple[Form, ...] = conv_forms(self.kernel) if self.kernel else ("matmul",)
        return (*usual, "pivoted") if self.shape[0] > 1 else usual

    def matrix(self) -> Tensor:
        """Return the weight as `(groups, out, in)`, a view if possible."""
        parameter = self.parameter.detach()
        if self.kind == "Conv1D":
            return parameter.T.contiguous()[None]
        return parameter.reshape(self.groups, *self.shape)


def find_module_sites(module: nn.Module) -> list[ModuleSite]:
    """Return every weight of the module tree, tied ones once, with the obstacles to a split."""
    computed = {child: _computed_parameters(child) for child in module.modules()}
    names = {id(p): name for name, p in module.named_parameters()}
    owners: dict[int, list[str]] = {}
    for path, child in module.named_modules(remove_duplicate=False):
        for key, parameter in (child._parameters | computed[child]).items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(_join(path, key))
                names.setdefault(id(parameter), _join(path, key))
    sites: dict[int, ModuleSite] = {}
    for child in module.modules():
        for key, kind, groups, obstacle in _weights_of(child):
            parameter = (child._parameters | computed[child]).get(key)
            if parameter is None or (id(parameter) in sites and not obstacle):
                continue
            users = tuple(owners[id(parameter)])
            if sharing := _sharing(computed_tensors(child).get(key, ()), users, owners):
                obstacle = obstacle or f"computed from a tensor that {sharing} uses too: splitting would grow the file"
            unsplittable = [u for u in users if not _splittable(module, u)]
            if not obstacle and unsplittable:
                obstacle = f"tied to {unsplittable[0]}, which needs the dense weight: splitting would grow the file"
            if not obstacle and (other := _used_otherwise(module, users)):
                obstacle = f"tied to {other}, which uses the weight otherwise: two pairs of factors would grow the file"
            sites[id(parameter)] = ModuleSite(
                weight=names[id(parameter)],
                kind=kind,
                parameter=parameter,
                paths=tuple(u.rpartition(".")[0] for u in users),
                obstacle=obstacle,
                groups=groups,
            )
    return list(sites.values())


def replace_site_(module: nn.Module, site: ModuleSite, replacement: Replacement) -> None:
    """Replace every layer that uses a site's weight by a low-rank one, in place. Tied layers share the factors.

    Args:
        module: module tree in which `find_module_sites` found the site.
        site: site without an obstacle. If the factors include a BatchNorm, it must be folded already.
        replacement: factors and bias in any floating dtype; they are stored in the dtype of the weight.

    Raises:
        UsageError: the module is itself the layer to replace.
    """
    if "" in site.paths:
        raise whole_module_error(module)
    new: dict[nn.Module, nn.Module] = {}
    layers = [module.get_submodule(path) for path in site.paths]
    for layer in layers:
        if layer not in new:
            fold_computed_(layer)
            new[layer] = low_rank_layer(layer, replacement)
            for key in _factors_of(new[layer]):
                new[layer].get_parameter(key).requires_grad_(site.parameter.requires_grad)
    for path, layer in zip(site.paths, layers, strict=True):
        module.set_submodule(path, new[layer])
    _tie_(list(new.values()))
    _leave_fused_path_(module)


def whole_module_error(module: nn.Module) -> UsageError:
    """Return the error for a module that is itself the layer to replace."""
    return UsageError(
        f"the module is itself a {type(module).__name__}, which cannot be replaced in place: pass nn.Sequential(module)"
    )


def low_rank_layer(layer: nn.Module, replacement: Replacement) -> nn.Module:
    """Return the low-rank replacement of a layer, in its dtype. An unchanged bias stays the same parameter object."""
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    assert isinstance(weight, Tensor)
    left, right = replacement.left, replacement.right
    change = replacement.bias.reshape(-1).to(weight) if replacement.bias.any() else None
    if replacement.form == "pivoted":
        bound = RUN_BOUND if weight.dtype.itemsize >= 4 else 0.0
        left, right, pivots = pivoted(left.detach(), right.detach(), run_bound=bound)
        found = PivotedFactors(left.to(weight), right.to(weight), pivots.to(weight.device))
        return _pivoted_layer(layer, found, change).train(layer.training)
    if weight.dtype.itemsize < 4 and left.dtype != weight.dtype and replacement.form not in FOLDED:
        left, right = balanced(left, right)
    factors = Factors(left.to(weight), right.to(weight))
    new: nn.Module
    if isinstance(layer, nn.modules.conv._ConvNd):
        new = LowRankConv(layer, factors, replacement.form, bias_change=change)
    elif isinstance(layer, nn.MultiheadAttention):
        new = LowRankMultiheadAttention(layer, Factors(factors.left[0], factors.right[0]), bias_change=change)
    else:
        bias = layer.bias
        assert bias is None or isinstance(bias, Tensor)
        new = LowRankLinear(Factors(factors.left[0], factors.right[0]), changed_bias(bias, change))
    return new.train(layer.training)


def _pivoted_layer(layer: nn.Module, factors: PivotedFactors, change: Tensor | None) -> nn.Module:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return PivotedConv(layer, factors, bias_change=change)
    if isinstance(layer, nn.MultiheadAttention):
        return PivotedMultiheadAttention(layer, factors, bias_change=change)
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return PivotedLinear(factors, changed_bias(bias, change))


def _computed_parameters(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the weights that a layer computes at every call, as parameters with their current values."""
    return {
        name: nn.Parameter(value_of(layer, name), requires_grad=any(source.requires_grad for source in sources))
        for name, sources in computed_tensors(layer).items()
    }


def _sharing(sources: Sequence[Tensor], users: Sequence[str], owners: Mapping[int, Sequence[str]]) -> str:
    """Return another owner of a tensor that the weight at the paths `users` is computed from, or ""."""
    layers = tuple(f"{user.rpartition('.')[0]}." for user in users)
    others = (owner for source in sources for owner in owners.get(id(source), ()))
    return next((owner for owner in others if not owner.startswith(layers) and "." not in layers), "")


def _weights_of(layer: nn.Module) -> list[tuple[str, str, int, str]]:
    """Return `(parameter key, kind, groups, obstacle)` of the weights that belong to the layer itself."""
    kind = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention):
        if layer._qkv_same_embed_dim and layer.bias_k is None and not layer.add_zero_attn:
            return [("in_proj_weight", kind, 1, "")]
        why = "MultiheadAttention with separate q/k/v widths, bias_kv or zero_attn is not split in PyTorch"
        keys = ("in_proj_weight",) if layer._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [(key, kind, 1, why) for key in keys]
    if isinstance(layer, nn.Linear):
        custom = type(layer).forward is not nn.Linear.forward
        return [("weight", "Linear", 1, f"{kind} has a forward of its own" if custom else "")]
    if _is_transformers_conv1d(layer):
        return [("weight", "Conv1D", 1, "")]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [("weight", kind, 1, "ConvTranspose is not split")]
    if isinstance(layer, nn.modules.conv._ConvNd):
        custom = type(layer).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        return [("weight", kind, layer.groups, f"{kind} has a forward of its own" if custom else "")]
    if isinstance(layer, nn.RNNBase):
        return [
            (key, kind, 1, "recurrent weights are not split") for key in layer._flat_weights_names if "weight" in key
        ]
    return []


def _used_otherwise(module: nn.Module, users: Sequence[str]) -> str:
    """Return a user that transposes the weight, or cuts it into groups, unlike the first one; or ""."""
    ways = {}
    for user in users:
        path, _, key = user.rpartition(".")
        (way,) = [
            (kind == "Conv1D", groups) for k, kind, groups, _ in _weights_of(module.get_submodule(path)) if k == key
        ]
        ways[user] = way
    return next((user for user, way in ways.items() if way != ways[users[0]]), "")


def _splittable(module: nn.Module, parameter_path: str) -> bool:
    path, _, key = parameter_path.rpartition(".")
    return any(k == key and not obstacle for k, _, _, obstacle in _weights_of(module.get_submodule(path)))


def _is_transformers_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _leave_fused_path_(module: nn.Module) -> None:
    """Turn off the fused inference path of torch's encoders with low-rank layers, because it reads dense weights."""
    low_rank = (LowRankLinear, LowRankMultiheadAttention)
    for child in module.modules():
        if isinstance(child, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and any(
            isinstance(layer, low_rank) for layer in child.modules()
        ):
            child.use_nested_tensor = False  # for the stack
            child.activation_relu_or_gelu = 0  # for the layer: neither, so that it calls its own `activation`


def _tie_(layers: Sequence[nn.Module]) -> None:
    for other in layers[1:]:
        for key in _factors_of(layers[0]) & _factors_of(other):
            path, _, name = key.rpartition(".")
            other.get_submodule(path)._parameters[name] = layers[0].get_parameter(key)


def _factors_of(layer: nn.Module) -> set[str]:
    return FACTOR_KEYS & {name for name, _ in layer.named_parameters()}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
