"""Trace one run of a torch module: the order of its sites, their inputs, and the tensors that outputs are added to."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rsi_deploy.torch_models.calibration.calls import Layer, LayerCall, Watch
from rsi_deploy.torch_models.calibration.rows import ConvReader, LinearReader, Reader
from rsi_deploy.torch_models.layers import OpenMultiheadAttention
from rsi_deploy.torch_models.module_sites import ModuleSite


class BatchTrace(Watch):
    """A run of one batch that records every call of a site.

    Attributes:
        inputs: site -> number of the tensor that its first call reads, in execution order. Calls that read the same
            tensor have the same number.
        rows: site -> number of rows in all its calls.
        calls: site -> number of calls.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.inputs: dict[str, int] = {}
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._read: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._uses: Counter[LayerCall] = Counter()
        self._summands: set[LayerCall] = set()

    def called(self, call: LayerCall, layer: Layer, x: Tensor) -> bool:
        """See `Watch`."""
        number, version = self._read.get(x, (-1, -1))  # type: ignore[no-untyped-call]
        if version != x._version:
            number = sum(self.calls.values())
            self._read[x] = number, x._version
        self.inputs.setdefault(call.site, number)
        self.rows[call.site] += layer.reader.count(x)
        self.calls[call.site] += 1
        return True

    def added(self, call: LayerCall, other: Tensor) -> None:
        """See `Watch`."""
        self._uses[call] += 1
        if other.is_floating_point():
            self._summands.add(call)

    def used(self, call: LayerCall) -> None:
        """See `Watch`."""
        self._uses[call] += 1

    @property
    def summands(self) -> set[LayerCall]:
        """The calls whose only use is an addition to a tensor, so that nothing else depends on their output."""
        return {call for call in self._summands if self._uses[call] == 1}


def attentions_of(module: nn.Module) -> dict[nn.Module, OpenMultiheadAttention]:
    """Return the packed attentions of a module tree, each with an equivalent that calls its layers."""
    return {
        child: OpenMultiheadAttention(child)
        for child in module.modules()
        if isinstance(child, nn.MultiheadAttention)
        and type(child).forward is nn.MultiheadAttention.forward
        and child._qkv_same_embed_dim
        and child.bias_k is None
        and not child.add_zero_attn
    }


def layers_of(
    module: nn.Module, sites: Iterable[ModuleSite], attentions: Mapping[nn.Module, OpenMultiheadAttention]
) -> list[Layer]:
    """Return the layers that are called where the weights of `sites` are used."""
    layers = []
    for site in sites:
        for owner in dict.fromkeys(module.get_submodule(path) for path in site.paths):
            if isinstance(owner, nn.MultiheadAttention):
                if owner not in attentions:
                    continue
                called: nn.Module = attentions[owner].in_proj
            else:
                called = owner
            reader: Reader = (
                ConvReader(called) if isinstance(called, nn.modules.conv._ConvNd) else LinearReader(site.shape[1])
            )
            layers.append(Layer(site=site.name, module=called, reader=reader))
    return layers


def staged(inputs: Mapping[str, int], stages: int) -> list[list[str]]:
    """Divide sites into at most `stages` runs of similar length. Neighbours that read one tensor stay together.

    Args:
        inputs: `BatchTrace.inputs`.
        stages: largest number of runs, at least 1.

    Examples:
        >>> staged({"q": 0, "k": 0, "v": 0, "out": 1, "up": 2, "down": 3}, 2)
        [['q', 'k', 'v', 'out'], ['up', 'down']]
    """
    together: list[list[str]] = []
    before = None
    for name, tensor in inputs.items():
        if tensor == before:
            together[-1].append(name)
        else:
            together.append([name])
        before = tensor
    count = min(stages, len(together))
    bounds = [len(together) * index // max(count, 1) for index in range(count + 1)]
    return [[name for names in together[a:b] for name in names] for a, b in itertools.pairwise(bounds)]
