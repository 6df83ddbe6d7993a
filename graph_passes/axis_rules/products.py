"""Rules of operators that multiply: matrix products, convolutions, pooling.

MatMul   rows and leading axes stay, the inner axis is summed over
Conv     (samples, channels, *space): the window moves over space and reads all channels
"""

from collections.abc import Callable, Sequence
from functools import partial

from graph_passes.axis_rules.moves import (
    CHANNELS,
    MICROSOFT,
    NCHWC,
    NHWC,
    WEIGHS,
    Moves,
    Target,
    only,
    rule,
    unknown_dims,
)
from graph_passes.axis_rules.pointwise import broadcast
from graph_passes.axis_rules.values import Dims, NodeCall

SUMS = "sums products over"


def meets(call: NodeCall, others: Sequence[int]) -> str:
    """Say what a product does along an axis that is summed over: one that meets weights alone holds features."""
    values = [call.value(other) for other in others]
    return WEIGHS if values and all(value is not None and value.free for value in values) else SUMS


def product(call: NodeCall, right: int, *, turned: tuple[bool, bool] = (False, False), like: str = "") -> Moves:
    """Return the moves of a product of input 0 and input `right`, each of them maybe with its last two axes swapped."""
    ranks = call.rank(0), call.rank(right)
    if 0 in ranks:
        raise call.mixes("multiplies a scalar as a matrix")
    output = max(*ranks, 2) - ranks.count(1)
    rows, columns = ranks[0] > 1, ranks[1] > 1
    lead = output - rows - columns
    left: list[Target] = [*(lead - (ranks[0] - 2) + axis for axis in range(ranks[0] - 2))]
    inner: list[Target] = [lead, meets(call, [right])] if rows else [meets(call, [right])]
    left += inner[::-1] if turned[0] and rows else inner
    second: list[Target] = [*(lead - (ranks[1] - 2) + axis for axis in range(ranks[1] - 2))]
    inner = [meets(call, [0]), output - 1] if columns else [meets(call, [0])]
    second += inner[::-1] if turned[1] and columns else inner
    return Moves(inputs={0: left, right: second}, dims=_product_dims(call, right, turned), like=like)


def _product_dims(call: NodeCall, right: int, turned: tuple[bool, bool]) -> Callable[[int], Dims]:
    def dims(trial: int) -> Dims:
        a, b = call.dims(0, trial), call.dims(right, trial)
        rows = a[-1 if turned[0] else -2 :][:1] if len(a) > 1 else ()
        columns = b[-2 if turned[1] else -1 :][:1] if len(b) > 1 else ()
        return (*broadcast([a[:-2], b[:-2]]), *rows, *columns)

    return dims


rule("MatMulInteger")(partial(product, right=1))
rule("MatMulIntegerToFloat", MICROSOFT)(partial(product, right=1))
rule("QLinearMatMul")(partial(product, right=3))
rule("QLinearMatMul", MICROSOFT)(partial(product, right=3))


@rule("FusedMatMulActivation TransposeMatMul", MICROSOFT)
def turned_product(call: NodeCall) -> Moves:
    """Return the moves of a product with transA and transB."""
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.mixes("moves its batch axis (transBatchA or transBatchB), which is not followed")
    turned = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    return product(call, 1, turned=turned)


@rule("MatMulNBits MatMulBnb4 MatMulFpQ4", MICROSOFT)
def _packed_matmul(call: NodeCall) -> Moves:
    columns = call.attribute("N")
    return Moves(
        inputs={0: [*range(call.rank(0) - 1), WEIGHS]}, dims=lambda trial: (*call.dims(0, trial)[:-1], columns)
    )


@rule("GemmFastGelu QGemm", MICROSOFT)
def gemm(call: NodeCall) -> Moves:
    """Return the moves of a Gemm and its relatives; C is broadcast to the output."""
    right, addend = (3, 6) if call.node.op_type == "QGemm" else (1, 2)
    turned = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    moves = product(call, right, turned=turned)
    inputs = dict(moves.inputs)
    if call.value(addend) is not None:
        inputs[addend] = [2 - call.rank(addend) + axis for axis in range(call.rank(addend))]
    return Moves(inputs=inputs, dims=moves.dims)


def windowed(call: NodeCall, *, channels: str, like: str = "", extra: int | None = None, outputs: int = 1) -> Moves:
    """Return the moves of an operator that moves a window over `(samples, channels, *space)`."""
    rank = call.rank(0)
    if any(name for name in call.node.output[outputs:]):
        raise call.mixes("gives indices into the whole batch")
    targets: list[Target] = [0, channels or 1, *["moves a window along"] * (rank - 2)]
    inputs = {0: targets[:rank]}
    if extra is not None and call.value(extra) is not None:
        inputs[extra] = targets
    return Moves(
        inputs=inputs, like=like, dims=lambda trial: (*call.dims(0, trial)[:1], *unknown_dims(rank - 1)(trial))
    )


_over_channels = partial(windowed, channels=CHANNELS)
rule("ConvInteger QLinearConv")(_over_channels)
rule("QLinearConv NhwcConv", MICROSOFT)(_over_channels)
rule("Conv QLinearConv ConvInteger QLinearConvTranspose", NHWC)(_over_channels)
rule("NhwcFusedConv", MICROSOFT)(partial(windowed, channels=CHANNELS, extra=3))
rule("Conv", NCHWC)(partial(windowed, channels=CHANNELS, like="Conv", extra=3))

rule("AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool")(partial(windowed, channels=""))
rule("QLinearAveragePool QLinearGlobalAveragePool NhwcMaxPool", MICROSOFT)(_over_channels)
rule("MaxPool AveragePool GlobalAveragePool GlobalMaxPool QLinearAveragePool QLinearGlobalAveragePool", NHWC)(
    _over_channels
)


@rule("MaxPool AveragePool GlobalAveragePool GlobalMaxPool", NCHWC)
def _pool_in_blocks(call: NodeCall) -> Moves:
    return windowed(call, channels=CHANNELS, like=call.node.op_type)


@rule("ReorderInput ReorderOutput Upsample", NCHWC)
def _reorder(call: NodeCall) -> Moves:
    """Convert to and from blocks of channels; the samples stay in front."""
    rank = call.rank(0)
    channels, last = call.attribute("channels"), bool(call.attribute("channels_last", 0))

    def dims(trial: int) -> Dims:
        before = call.dims(0, trial)
        if call.node.op_type == "Upsample":
            return (*before[:2], *(None,) * (rank - 2))
        if call.node.op_type == "ReorderInput":
            return (before[0], before[-1], *before[1:-1]) if last else before
        return (before[0], *before[2:], channels) if last else (before[0], channels, *before[2:])

    return Moves(inputs={0: only(rank, CHANNELS, {0: 0})}, dims=dims)


@rule("DepthToSpace SpaceToDepth")
def _blocks(call: NodeCall) -> Moves:
    return Moves(inputs={0: only(call.rank(0), "rearranges", {0: 0})})


@rule("GridSample")
def _grid_sample(call: NodeCall) -> Moves:
    grid = only(call.rank(1), "samples at places along", {0: 0})
    return Moves(inputs={0: only(call.rank(0), "samples along", {0: 0, 1: 1}), 1: grid}, strict=True)


@rule("LRN")
def _local_norm(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return Moves(inputs={0: [CHANNELS if axis == 1 else axis for axis in range(rank)]})
