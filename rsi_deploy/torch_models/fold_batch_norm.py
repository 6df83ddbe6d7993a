"""Fold an inference BatchNorm into the Conv before it, in a torch module.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta
      = (s W) x + (beta + (b - mean) s),   s = gamma / sqrt(var + eps)

A Conv must be folded *before* it is factorized. Otherwise the error is weighted without the scale of the BatchNorm, and
the statistics no longer fit. The computation is in float64, as in `graph_passes.FoldBatchNormPass`.
"""

import logging
from collections import Counter

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def batch_norms_behind_convs(module: nn.Module) -> dict[str, str]:
    """Map the path of each Conv to the path of the BatchNorm that is the only user of its output.

    A Conv whose weight the model also reads directly (`F.conv2d(x, self.conv.weight)`) is not included.

    The pairs are found by symbolic tracing (torch.fx). If a model cannot be traced, nothing is folded, with a warning
    in the log: the result is correct but somewhat less accurate.
    """
    norms = {name for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if not norms:
        return {}
    try:
        graph = torch.fx.Tracer().trace(module)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        logger.warning("BatchNorms are not folded: the model cannot be traced symbolically (%s)", error)
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    modules = dict(module.named_modules())
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs: dict[str, str] = {}
    for node in calls:
        source = node.args[0] if node.args else None
        if (
            node.target in norms
            and isinstance(source, torch.fx.Node)
            and source.op == "call_module"
            and isinstance(modules[str(source.target)], nn.modules.conv._ConvNd)
            and len(source.users) == 1
            and targets.count(node.target) == targets.count(source.target) == 1
            and read.isdisjoint((node.target, source.target))
        ):
            pairs[str(source.target)] = str(node.target)
    return pairs


def fold_batch_norms_(module: nn.Module) -> None:
    """Fold every BatchNorm of `module` into the Conv before it where possible, and put an Identity in its place."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    for path, norm_path in batch_norms_behind_convs(module).items():
        conv, norm = module.get_submodule(path), module.get_submodule(norm_path)
        assert isinstance(conv, nn.modules.conv._ConvNd)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if uses[id(conv.weight)] == 1 and norm.running_mean is not None and not norm.training:
            fold_batch_norm_(conv, norm)
            module.set_submodule(norm_path, nn.Identity())


def fold_batch_norm_(conv: "nn.modules.conv._ConvNd", norm: "nn.modules.batchnorm._BatchNorm") -> None:
    """Fold `norm`, which must have running statistics, into `conv`, in place."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a BatchNorm without running statistics depends on the batch and cannot be folded")
    mean, var = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias.double()
    scale = gamma / torch.sqrt(var + norm.eps)
    shape = (-1, *(1 for _ in conv.weight.shape[1:]))
    conv.weight = _like(conv.weight.double() * scale.view(shape), conv.weight)
    conv.bias = _like(beta + (bias - mean) * scale, conv.weight)


def _like(value: Tensor, parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().to(parameter.dtype), requires_grad=parameter.requires_grad)
