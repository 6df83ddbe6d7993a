"""The PyTorch pass: replace a model's dense layers by low-rank ones, in place.

    nn.Linear, transformers' Conv1D      -> LowRankLinear
    nn.Conv1d / 2d / 3d (groups too)     -> LowRankConv, a BatchNorm behind it folded first
    nn.MultiheadAttention, packed        -> LowRankMultiheadAttention (in_proj), LowRankLinear (out_proj)

The result stays an ordinary trainable module. Exporting it gives the same numbers as exporting the dense model and
splitting in ONNX, because a site's factors depend on its weight, its name and the seed alone. (Joint splits are made in
ONNX only, where the graph tells what multiplies the same input: `joint=False` for the same numbers there.)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graph_passes.forms import Form, conv_forms
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.sites import SiteRecord, dense_record, site_name
from rsi_deploy.linalg.batched_solver import FactorizationRequest, gains_from_batching, solve_in_batches
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Factors, Method, PowerIterations, Route, Solver, balanced
from rsi_deploy.planning.error_rank import smallest_rank
from rsi_deploy.planning.planner import MaxError, Planner, RankSpec, rank_spec
from rsi_deploy.torch_models.computed_weights import computed_tensors, fold_computed_, value_of
from rsi_deploy.torch_models.fold_batch_norm import batch_norms_behind_convs, fold_batch_norm_
from rsi_deploy.torch_models.layers import LowRankConv, LowRankLinear, LowRankMultiheadAttention, changed_bias

FACTOR_KEYS = {"left", "right", "in_proj_left", "in_proj_right"}

Progress = Callable[[str, int, int], None]
"""Called with the site's name, its index from 0, and the number of sites."""


@dataclass(frozen=True, kw_only=True)
class ModuleSite:
    """One weight of a module tree and every layer that uses it (several, when tied).

    `obstacle` says why it cannot be split, or is empty.
    """

    weight: str
    kind: str
    parameter: nn.Parameter
    paths: tuple[str, ...]
    obstacle: str = ""

    @property
    def name(self) -> str:
        """The site's name, as in reports and filters."""
        return site_name(self.weight)

    @property
    def groups(self) -> int:
        """Groups of a Conv, else 1."""
        return self._groups

    _groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, per group."""
        if self.kind == "Conv1D":  # transformers stores (in, out)
            return self.parameter.shape[1], self.parameter.shape[0]
        return self.parameter.shape[0] // self.groups, self.parameter.shape[1:].numel()

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a Conv; () for a product."""
        return tuple(self.parameter.shape[2:])

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms its split can take, the usual one first."""
        return conv_forms(self.kernel) if self.kernel else ("matmul",)

    def matrix(self) -> Tensor:
        """The canonical weight `(groups, out, in)`, a view where possible."""
        parameter = self.parameter.detach()
        if self.kind == "Conv1D":
            return parameter.T.contiguous()[None]
        return parameter.reshape(self.groups, *self.shape)


def compress_(
    module: nn.Module,
    rank: str | int | RankSpec | None = None,
    *,
    max_error: str | MaxError | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    method: Method = "rsi",
    power_iterations: PowerIterations = 4,
    oversampling: int = 0,
    seed: int = 0,
    route: Route = "auto",
    mixed_precision: bool = True,
    always_split: bool = False,
    progress: Progress | None = None,
) -> list[SiteRecord]:
    """Replace `module`'s layers by low-rank ones, in place, and say what was done at every site.

    A weight that is computed (weight_norm, spectral_norm, pruning) is factorized as the value it has in evaluation
    mode. What computes it goes with the layer, and stays where the layer stays dense.

    Every layer gets factors of its own: a right factor shared by several layers (`export(..., joint=True)`) is not made
    here.

    Args:
        module: any torch module; put in evaluation mode first if it has BatchNorms to fold.
        rank: a rank (`64`) or the paper's ratio (`"40%"`), see `RankSpec.parse`.
        max_error: instead of a rank, "5%" (of the weight's norm) or "1.1x" (times the best of that rank): at every site
            the smallest rank that meets it; see `MaxError`.
        include: globs on site names (the weight's name less `.weight`); empty means all.
        exclude: globs on site names that stay dense.
        method: "rsi", or a baseline: "rsvd", "svd".
        power_iterations: the paper's q for "rsi"; "auto" iterates until another pass would gain less than 1 %.
        oversampling: extra sketch columns.
        seed: of the random sketches.
        route: of the kernel, see `rsi_deploy.linalg.solver.Solver`; by default the cheapest.
        mixed_precision: iterations in bfloat16 where that is faster and does no harm.
        always_split: split even where nothing is saved.
        progress: called before each factorization.

    Returns:
        One record a site, in the module tree's order.

    Raises:
        UsageError: a rank or filter that cannot be meant, or a module that is itself the layer to be replaced.
        ModelError: NaN or infinite values in a weight, with the site's name.
    """
    if max_error is not None and always_split:
        raise UsageError("always_split goes with a rank; leave it out with max_error")
    planner = Planner(
        spec=rank_spec(rank, max_error), include=tuple(include), exclude=tuple(exclude), always_split=always_split
    )
    solver = Solver(
        method=method,
        power_iterations=power_iterations,
        oversampling=oversampling,
        seed=seed,
        route=route,
        mixed_precision=mixed_precision,
    )
    sites = find_module_sites(module)
    planner.check([(site.name, *site.shape) for site in sites if not site.obstacle])
    norms = {} if module.training else batch_norms_behind_convs(module)
    if isinstance(planner.spec, MaxError):
        wanted = [not site.obstacle and not planner.filters.refusal(site.name) for site in sites]
        sites = [_folded(module, s, norms) if want else s for s, want in zip(sites, wanted, strict=True)]
        norms = {}
        planner = _with_ranks(planner, sites, solver)
    decisions = [planner.decide(site.name, *site.shape) for site in sites]
    if any("" in s.paths and d.rank is not None and not s.obstacle for s, d in zip(sites, decisions, strict=True)):
        raise UsageError(
            f"the module is itself a {type(module).__name__}, which cannot be replaced in place: "
            f"pass nn.Sequential(module)"
        )
    split = [d.rank is not None and not s.obstacle for s, d in zip(sites, decisions, strict=True)]
    sites = [_folded(module, s, norms) if chosen else s for s, chosen in zip(sites, split, strict=True)]
    ahead = solve_in_batches(
        solver,
        {
            site.name: FactorizationRequest(site.matrix()[0], decision.rank)
            for site, decision, chosen in zip(sites, decisions, split, strict=True)
            if chosen and decision.rank is not None and site.groups == 1 and gains_from_batching(site.shape)
        },
    )
    records = []
    for index, (site, decision) in enumerate(zip(sites, decisions, strict=True)):
        if site.obstacle or decision.rank is None:
            reason = site.obstacle or decision.reason
            records.append(
                dense_record(site.name, site.kind, *site.shape, reason, groups=site.groups, nodes=site.paths)
            )
            continue
        if progress:
            progress(site.name, index, len(sites))
        factors, record = factorize_site(
            site.matrix(),
            decision.rank,
            ahead,
            name=site.name,
            kind=site.kind,
            reason=decision.reason,
            nodes=site.paths,
        )
        unchanged = torch.zeros(site.groups, site.shape[0])
        replace_site_(module, site, Replacement(site.forms[0], factors.left, factors.right, unchanged))
        records.append(record)
    return records


def _with_ranks(planner: Planner, sites: Sequence[ModuleSite], solver: Solver) -> Planner:
    """The planner with the rank of every site that meets its error."""
    assert isinstance(planner.spec, MaxError)
    ranks: dict[str, int | None] = {}
    for site in sites:
        if not site.obstacle and not planner.filters.refusal(site.name):
            try:
                ranks[site.name] = smallest_rank(site.matrix(), planner.spec, solver, site=site.name)
            except ValueError as error:
                raise ModelError(f"{error} (exclude {site.name!r} to leave it dense)") from error
    return dataclasses.replace(planner, ranks=ranks)


def find_module_sites(module: nn.Module) -> list[ModuleSite]:
    """Every weight-bearing layer of the tree, tied weights once, with what stands in the way of a split."""
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
            strangers = [u for u in users if not _splittable(module, u)]
            if not obstacle and strangers:
                obstacle = f"tied to {strangers[0]}, which needs the dense weight: splitting would grow the file"
            if not obstacle and (other := _used_otherwise(module, users)):
                obstacle = f"tied to {other}, which uses the weight otherwise: two pairs of factors would grow the file"
            sites[id(parameter)] = ModuleSite(
                weight=names[id(parameter)],
                kind=kind,
                parameter=parameter,
                paths=tuple(u.rpartition(".")[0] for u in users),
                obstacle=obstacle,
                _groups=groups,
            )
    return list(sites.values())


def _computed_parameters(layer: nn.Module) -> dict[str, nn.Parameter | None]:
    """The weights of a layer that are computed at every call, as parameters of their value."""
    return {
        name: nn.Parameter(value_of(layer, name), requires_grad=any(source.requires_grad for source in sources))
        for name, sources in computed_tensors(layer).items()
    }


def _sharing(sources: Sequence[Tensor], users: Sequence[str], owners: Mapping[int, Sequence[str]]) -> str:
    """Who else owns one of the tensors that the weight at the paths `users` is computed from; "" for nobody."""
    layers = tuple(f"{user.rpartition('.')[0]}." for user in users)
    others = (owner for source in sources for owner in owners.get(id(source), ()))
    return next((owner for owner in others if not owner.startswith(layers) and "." not in layers), "")


def replace_site_(module: nn.Module, site: ModuleSite, replacement: Replacement) -> None:
    """Put what a site becomes in every place its weight is used, in place; tied places share the two factors.

    Args:
        module: the tree in which `find_module_sites` found the site.
        site: without an obstacle; the BatchNorm behind it folded already, where the factors were made so.
        replacement: in any floating dtype; stored in the weight's.

    Raises:
        UsageError: the module is itself the layer to be replaced.
    """
    if "" in site.paths:
        raise UsageError(
            f"the module is itself a {type(module).__name__}, which cannot be replaced in place: "
            f"pass nn.Sequential(module)"
        )
    new: dict[nn.Module, nn.Module] = {}
    layers = [module.get_submodule(path) for path in site.paths]
    for layer in layers:
        if layer not in new:
            fold_computed_(layer)
            new[layer] = low_rank_layer(layer, replacement)
            for key in FACTOR_KEYS & new[layer]._parameters.keys():
                new[layer].get_parameter(key).requires_grad_(site.parameter.requires_grad)
    for path, layer in zip(site.paths, layers, strict=True):
        module.set_submodule(path, new[layer])
    _tie_(list(new.values()))
    _leave_fused_path_(module)


def low_rank_layer(layer: nn.Module, replacement: Replacement) -> nn.Module:
    """The layer that `layer` (of a kind that `find_module_sites` finds without an obstacle) becomes, in its dtype.

    A bias that does not change stays the very same parameter.
    """
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    assert isinstance(weight, Tensor)
    left, right = replacement.left, replacement.right
    if weight.dtype.itemsize < 4 and left.dtype != weight.dtype:
        left, right = balanced(left, right)
    factors = Factors(left.to(weight), right.to(weight))
    change = replacement.bias.reshape(-1).to(weight) if replacement.bias.any() else None
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


def _weights_of(layer: nn.Module) -> list[tuple[str, str, int, str]]:
    """`(parameter key, kind, groups, obstacle)` of the weights a layer bears itself."""
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
    """A user that turns the weight, or cuts it into groups, otherwise than the first one; or ""."""
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


def _folded(module: nn.Module, site: ModuleSite, norms: dict[str, str]) -> ModuleSite:
    """The site with the BatchNorm behind it folded in, where there is one."""
    if len(site.paths) != 1 or site.paths[0] not in norms:
        return site
    path, norm_path = site.paths[0], norms[site.paths[0]]
    conv, norm = module.get_submodule(path), module.get_submodule(norm_path)
    assert isinstance(conv, nn.modules.conv._ConvNd)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if norm.running_mean is None or norm.training:
        return site
    fold_computed_(conv)
    fold_batch_norm_(conv, norm)
    module.set_submodule(norm_path, nn.Identity())
    weight = conv.weight
    assert isinstance(weight, nn.Parameter)
    return ModuleSite(weight=site.weight, kind=site.kind, parameter=weight, paths=site.paths, _groups=site.groups)


def _leave_fused_path_(module: nn.Module) -> None:
    """Keep torch's encoders off their fused inference path, which reads dense weights, where a layer is low-rank."""
    low_rank = (LowRankLinear, LowRankMultiheadAttention)
    for child in module.modules():
        if isinstance(child, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and any(
            isinstance(layer, low_rank) for layer in child.modules()
        ):
            child.use_nested_tensor = False  # of the stack
            child.activation_relu_or_gelu = 0  # of the layer: "neither", so only its own `activation` is called


def _tie_(layers: Sequence[nn.Module]) -> None:
    for other in layers[1:]:
        for key in FACTOR_KEYS & layers[0]._parameters.keys() & other._parameters.keys():
            other._parameters[key] = layers[0]._parameters[key]


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
