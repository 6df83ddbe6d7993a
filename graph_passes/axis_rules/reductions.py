"""Rules of operators that read whole axes: reductions, normalizations, softmax, sorting, running sums."""

from graph_passes.axis_rules.moves import CHANNELS, MICROSOFT, Moves, Target, dims_of, kept, only, rule, unknown_dims
from graph_passes.axis_rules.values import NodeCall

NORMALIZES = "normalizes over"
OPSET_13 = 13
"""Older opsets treat all axes from `axis` on as one axis of a softmax."""


@rule(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
)
def _reduce(call: NodeCall) -> Moves:
    return reduced(call, call.axes(1))


@rule("QLinearReduceMean", MICROSOFT)
def _quantized_reduce(call: NodeCall) -> Moves:
    return reduced(call, call.axes(99))


def reduced(call: NodeCall, axes: tuple[int, ...] | None) -> Moves:
    """Return the moves of a reduction over `axes`, which stay with size 1 under `keepdims`."""
    rank, keeps = call.rank(0), bool(call.attribute("keepdims", 1))
    if not axes:
        axes = () if call.attribute("noop_with_empty_axes", 0) else tuple(range(rank))
    gone = {axis % max(rank, 1) for axis in axes}
    left = list(range(rank)) if keeps else [axis for axis in range(rank) if axis not in gone]
    targets: list[Target] = ["reduces over" if axis in gone else left.index(axis) for axis in range(rank)]
    return Moves(inputs={0: targets}, dims=unknown_dims(len(left)))


@rule("ArgMax ArgMin")
def _arg(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return reduced(call, (call.axis(rank, default=0),))


@rule("TopK")
def _top(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return Moves(inputs={0: kept(rank, "sorts along", [call.axis(rank)])}, dims=unknown_dims(rank))


@rule("CumSum CumProd")
def _running(call: NodeCall) -> Moves:
    axis = call.constant(1)
    if axis is None:
        raise call.mixes("takes an axis that is not constant")
    return Moves(inputs={0: kept(call.rank(0), "adds up along", [int(axis.reshape(-1)[0])])})


@rule("Softmax LogSoftmax Hardmax")
@rule("QLinearSoftmax", MICROSOFT)
def _softmax(call: NodeCall) -> Moves:
    rank = call.rank(0)
    opset = int(call.attribute("opset", OPSET_13)) if call.node.domain else call.opset
    if opset >= OPSET_13:
        along = range(call.axis(rank), call.axis(rank) + 1)
    else:
        along = range(call.axis(rank, default=1) if rank > 1 else 0, rank)
    return Moves(inputs={0: kept(rank, NORMALIZES, along)}, dims=dims_of(call))


@rule("LpNormalization MeanVarianceNormalization")
def _normalize(call: NodeCall) -> Moves:
    is_lp, rank = call.node.op_type == "LpNormalization", call.rank(0)
    return Moves(inputs={0: kept(rank, NORMALIZES, [call.axis(rank)] if is_lp else call.attribute("axes", [0, 2, 3]))})


@rule("LayerNormalization RMSNormalization SimplifiedLayerNormalization")
def _layer(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return Moves(inputs={0: kept(rank, NORMALIZES, range(call.axis(rank), rank))}, dims=dims_of(call))


@rule("SkipLayerNormalization SkipSimplifiedLayerNormalization", MICROSOFT)
def _skip_layer(call: NodeCall) -> Moves:
    rank, skip = call.rank(0), call.rank(1)
    targets: list[Target] = kept(rank, NORMALIZES, [-1])
    return Moves(inputs={0: targets, 1: targets[rank - skip :]}, dims=dims_of(call))


@rule("InstanceNormalization GroupNormalization")
def _instance(call: NodeCall) -> Moves:
    return Moves(inputs={0: only(call.rank(0), NORMALIZES, {0: 0})})


@rule("GroupNorm SkipGroupNorm", MICROSOFT)
def _group(call: NodeCall) -> Moves:
    targets = only(call.rank(0), NORMALIZES, {0: 0})
    inputs: dict[int, list[Target]] = {0: targets}
    if call.node.op_type == "SkipGroupNorm":
        inputs[3] = targets[-call.rank(3) :]
    return Moves(inputs=inputs, dims=dims_of(call))


@rule("BatchNormalization")
def _batch(call: NodeCall) -> Moves:
    named = [name for name in call.node.output if name]
    training = call.attribute("training_mode", 0) if call.opset >= 14 else len(named) > 1
    rank = call.rank(0)
    if training or (call.opset < 7 and not call.attribute("is_test", 0)):
        return Moves(inputs={0: ["is in training mode and normalizes over"] * rank})
    return Moves(inputs={0: [CHANNELS if axis == 1 else axis for axis in range(rank)]})


@rule("DFT")
def _transform(call: NodeCall) -> Moves:
    rank = call.rank(0)
    axis = call.constant(2)
    if call.value(2) is not None and axis is None:
        raise call.mixes("takes an axis that is not constant")
    along = int(axis.reshape(-1)[0]) if axis is not None else int(call.attribute("axis", 1 if call.opset < 20 else -2))
    return Moves(inputs={0: kept(rank, "transforms", [along, -1])}, dims=unknown_dims(rank))


@rule("STFT")
def _spectrogram(call: NodeCall) -> Moves:
    return Moves(inputs={0: only(call.rank(0), "transforms", {0: 0})}, dims=unknown_dims(4))


@rule("LinearClassifier LinearRegressor TreeEnsembleClassifier TreeEnsembleRegressor Normalizer", "ai.onnx.ml")
@rule("SVMClassifier SVMRegressor", "ai.onnx.ml")
def _classifier(call: NodeCall) -> list[Moves]:
    rank = call.rank(0)
    targets = only(rank, "takes for features", {0: 0} if rank > 1 else {})
    labels_first = call.node.op_type.endswith("Classifier")
    ranks = (1 if labels_first and index == 0 else 2 for index in range(len(call.node.output)))
    return [Moves(inputs={0: targets}, dims=unknown_dims(rank_of_output)) for rank_of_output in ranks]
