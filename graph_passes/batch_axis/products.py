"""Rules of operators that multiply: matrix products, Einsum, convolutions, pooling.

MatMul   rows and leading axes stay, the inner axis is summed over
Conv     (samples, channels, *space): the window moves over space and reads all channels
"""

from __future__ import annotations

from collections.abc import Callable

from graph_passes.batch_axis.moves import CHANNELS, MICROSOFT, NCHWC, NHWC, WEIGHS, Moves, Target, only, rule
from graph_passes.batch_axis.pointwise import broadcast
from graph_passes.batch_axis.values import Dims, NodeCall

SUMS = "sums products over"


def _sums(call: NodeCall, other: int) -> str:
    """What a product does along its inner axis: an axis that meets weights holds features."""
    value = call.value(other)
    return WEIGHS if value is not None and value.free else SUMS


def product(call: NodeCall, right: int, *, turned: tuple[bool, bool] = (False, False), like: str = "") -> Moves:
    """Axes of a matrix product of input 0 and input `right`, either of them with its last two axes swapped."""
    ranks = call.rank(0), call.rank(right)
    if 0 in ranks:
        raise call.mixes("multiplies a scalar as a matrix")
    output = max(*ranks, 2) - ranks.count(1)
    rows, columns = ranks[0] > 1, ranks[1] > 1
    lead = output - rows - columns
    left: list[Target] = [*(lead - (ranks[0] - 2) + axis for axis in range(ranks[0] - 2))]
    inner: list[Target] = [lead, _sums(call, right)] if rows else [_sums(call, right)]
    left += inner[::-1] if turned[0] and rows else inner
    second: list[Target] = [*(lead - (ranks[1] - 2) + axis for axis in range(ranks[1] - 2))]
    inner = [_sums(call, 0), output - 1] if columns else [_sums(call, 0)]
    second += inner[::-1] if turned[1] and columns else inner
    return Moves(inputs={0: left, right: second}, dims=_product_dims(call, right, turned), like=like)


def _product_dims(call: NodeCall, right: int, turned: tuple[bool, bool]) -> Callable[[int], Dims]:
    first, second = call.value(0), call.value(right)

    def dims(trial: int) -> Dims:
        a: Dims = () if first is None or first.shapes is None else first.shapes[trial]
        b: Dims = () if second is None or second.shapes is None else second.shapes[trial]
        rows = a[-1 if turned[0] else -2 :][:1] if len(a) > 1 else ()
        columns = b[-2 if turned[1] else -1 :][:1] if len(b) > 1 else ()
        return (*broadcast([a[:-2], b[:-2]]), *rows, *columns)

    return dims


@rule("MatMul MatMulInteger")
@rule("MatMulIntegerToFloat", MICROSOFT)
def _matmul(call: NodeCall) -> Moves:
    return product(call, 1)


@rule("QLinearMatMul")
@rule("QLinearMatMul", MICROSOFT)
def _quantized_matmul(call: NodeCall) -> Moves:
    return product(call, 3)


@rule("FusedMatMul FusedMatMulActivation TransposeMatMul", MICROSOFT)
def _fused_matmul(call: NodeCall) -> Moves:
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.mixes("moves its batch axis (transBatchA or transBatchB), which is not followed")
    turned = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    return product(call, 1, turned=turned)


@rule("MatMulNBits MatMulBnb4 MatMulFpQ4", MICROSOFT)
def _packed_matmul(call: NodeCall) -> Moves:
    value, rank, columns = call.value(0), call.rank(0), call.attribute("N")

    def dims(trial: int) -> Dims:
        before: Dims = value.shapes[trial][:-1] if value is not None and value.shapes is not None else ()
        return (*before, columns)

    return Moves(inputs={0: [*range(rank - 1), WEIGHS]}, dims=dims)


@rule("Gemm")
@rule("FusedGemm GemmFastGelu", MICROSOFT)
@rule("QGemm", MICROSOFT)
def _gemm(call: NodeCall) -> Moves:
    right, addend = (3, 6) if call.node.op_type == "QGemm" else (1, 2)
    turned = bool(call.attribute("transA", 0)), bool(call.attribute("transB", 0))
    moves = product(call, right, turned=turned)
    inputs = dict(moves.inputs)
    if call.value(addend) is not None:
        inputs[addend] = [2 - call.rank(addend) + axis for axis in range(call.rank(addend))]
    return Moves(inputs=inputs, dims=moves.dims)


@rule("Einsum")
def _einsum(call: NodeCall) -> Moves:
    equation = call.attribute("equation", b"").decode().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if not arrow or "." in equation:
        raise call.mixes(f"has the equation {equation!r}, which is not followed")
    inputs: dict[int, list[Target]] = {}
    for index, labels in enumerate(terms.split(",")):
        weighs = all(value is None or value.free for at, value in enumerate(call.inputs) if at != index)
        reason = WEIGHS if weighs and len(call.inputs) > 1 else SUMS
        inputs[index] = [result.index(c) if result.count(c) == 1 and labels.count(c) == 1 else reason for c in labels]
        if len(labels) != call.rank(index):
            raise call.mixes(f"has the equation {equation!r} for an input of rank {call.rank(index)}")
    return Moves(inputs=inputs, dims=lambda _: (None,) * len(result))


def windowed(call: NodeCall, *, channels: str, like: str = "", extra: int | None = None, outputs: int = 1) -> Moves:
    """Axes of an operator that moves a window over `(samples, channels, *space)`."""
    rank = call.rank(0)
    if any(name for name in call.node.output[outputs:]):
        raise call.mixes("gives indices into the whole batch")
    targets: list[Target] = [0, channels or 1, *["moves a window along"] * (rank - 2)]
    inputs = {0: targets[:rank]}
    if extra is not None and call.value(extra) is not None:
        inputs[extra] = targets
    value = call.value(0)
    return Moves(
        inputs=inputs,
        like=like,
        dims=lambda trial: (
            (value.shapes[trial][:1] if value is not None and value.shapes is not None else ()) + (None,) * (rank - 1)
        ),
    )


@rule("Conv ConvTranspose ConvInteger QLinearConv")
@rule("QLinearConv NhwcConv FusedConv NhwcFusedConv", MICROSOFT)
@rule("Conv", NCHWC)
@rule("Conv QLinearConv ConvInteger QLinearConvTranspose", NHWC)
def _conv(call: NodeCall) -> Moves:
    fused = call.node.domain == NCHWC or call.node.op_type.endswith("FusedConv")
    plain = call.node.op_type == "FusedConv" or call.node.domain == NCHWC
    return windowed(call, channels=CHANNELS, like="Conv" if plain else "", extra=3 if fused else None)


@rule("AveragePool MaxPool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool")
def _pool(call: NodeCall) -> Moves:
    return windowed(call, channels="")


@rule("QLinearAveragePool QLinearGlobalAveragePool NhwcMaxPool", MICROSOFT)
@rule("MaxPool AveragePool GlobalAveragePool GlobalMaxPool QLinearAveragePool QLinearGlobalAveragePool", NHWC)
def _pool_channels_last(call: NodeCall) -> Moves:
    return windowed(call, channels=CHANNELS)


@rule("MaxPool AveragePool GlobalAveragePool GlobalMaxPool", NCHWC)
def _pool_in_blocks(call: NodeCall) -> Moves:
    return windowed(call, channels=CHANNELS, like=call.node.op_type)


@rule("ReorderInput ReorderOutput Upsample", NCHWC)
def _reorder(call: NodeCall) -> Moves:
    """To and from blocks of channels; the samples stay in front."""
    rank, value = call.rank(0), call.value(0)
    channels, last = call.attribute("channels"), bool(call.attribute("channels_last", 0))

    def dims(trial: int) -> Dims:
        before: Dims = (None,) * rank if value is None or value.shapes is None else value.shapes[trial]
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
