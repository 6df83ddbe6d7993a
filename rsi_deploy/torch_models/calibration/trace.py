"""One traced run of a torch module: in which order its sites are called, with what, and what stands beside them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from rsi_deploy.torch_models.calibration.calls import Layer, LayerCall, Watch
from rsi_deploy.torch_models.calibration.rows import ConvReader, LinearReader, Reader
from rsi_deploy.torch_models.compress import ModuleSite
from rsi_deploy.torch_models.layers import OpenMultiheadAttention


class BatchTrace(Watch):
    """What one run of a batch tells.

    Attributes:
        inputs: site -> number of the tensor that its first call reads, equal for the very same one; in execution order.
        rows: site -> rows of all its calls.
        calls: site -> how many.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self.inputs: dict[str, int] = {}
        self.rows: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._read: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._uses: Counter[LayerCall] = Counter()
        self._joined: set[LayerCall] = set()

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

    def joined(self, call: LayerCall, beside: Tensor) -> None:
        """See `Watch`."""
        self._uses[call] += 1
        if beside.is_floating_point():
            self._joined.add(call)

    def used(self, call: LayerCall) -> None:
        """See `Watch`."""
        self._uses[call] += 1

    @property
    def added(self) -> set[LayerCall]:
        """The calls whose output is used once, by adding it to a tensor: nothing else can depend on it."""
        return {call for call in self._joined if self._uses[call] == 1}


def attentions_of(module: nn.Module) -> dict[nn.Module, OpenMultiheadAttention]:
    """The packed attentions of a tree, each with one that calls its layers."""
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
    """What is called where the weights of `sites` are used."""
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
    """The sites in at most `stages` runs of about equal length; neighbours that read the same tensor stay together.

    Args:
        inputs: as of `BatchTrace`.
        stages: at least 1.

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
