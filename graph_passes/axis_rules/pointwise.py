"""Rules of operators that work element by element, with broadcasting: every axis stays where it is."""

from functools import partial

from graph_passes.axis_rules.moves import MICROSOFT, Moves, aligned, dims_of, kept, rule
from graph_passes.axis_rules.values import Dims, NodeCall


def broadcast(dims: list[Dims]) -> Dims:
    """Return the shape to which shapes broadcast; None for sizes that are not known or do not fit."""
    rank = max(map(len, dims), default=0)
    padded = [(1,) * (rank - len(each)) + tuple(each) for each in dims]
    found: list[int | None] = []
    for sizes in zip(*padded, strict=True):
        larger = {size for size in sizes if size != 1}
        found.append(1 if not larger else larger.pop() if len(larger) == 1 else None)
    return tuple(found)


def elementwise(call: NodeCall, operands: list[int]) -> Moves:
    """Return the moves of operands that broadcast against each other; all other inputs are parameters."""
    there = [index for index in operands if call.value(index) is not None]
    rank = max((call.rank(index) for index in there), default=0)
    return Moves(
        inputs={index: aligned(call.rank(index), rank) for index in there},
        dims=lambda trial: broadcast([call.dims(index, trial) for index in there]),
    )


_ONNX = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu "
    "Clip Cos Cosh Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN "
    "LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink "
    "Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
)
_OTHERS = "BiasGelu BiasAdd FastGelu Gelu QuickGelu"
ELEMENTWISE = frozenset({*(("", name) for name in _ONNX.split()), *((MICROSOFT, name) for name in _OTHERS.split())})
"""(domain, operator) of the operators whose operands broadcast against each other."""


@rule(_ONNX)
@rule(_OTHERS, MICROSOFT)
def _elementwise(call: NodeCall) -> Moves:
    if call.attribute("broadcast", 0):
        raise call.mixes("broadcasts as before opset 7, which is not followed")
    return elementwise(call, list(range(len(call.inputs))))


@rule("CastLike")
def _first_alone(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return Moves(inputs={0: kept(rank)}, arguments=frozenset({1}))


@rule("Dropout")
def _dropout(call: NodeCall) -> Moves:
    training = call.constant(2)
    if call.value(2) is not None and (training is None or training.any()):
        raise call.mixes("may be in training mode: it draws random numbers")
    return Moves(inputs={0: kept(call.rank(0))})


@rule("QuantizeLinear DequantizeLinear")
@rule("QuantizeLinear DequantizeLinear", MICROSOFT)
def _quantize(call: NodeCall) -> Moves:
    rank, scale = call.rank(0), call.rank(1)
    per_axis = (call.axis(rank, default=1),) if scale else ()
    value = call.value(1)
    if value is not None and value.shapes is not None and value.shapes[0] == (1,):
        per_axis = ()  # one number in a vector
    reason = "has a scale for every entry of"
    return Moves(inputs={0: kept(rank, reason, range(rank) if scale > 1 else per_axis)}, dims=dims_of(call))


rule("QLinearAdd QLinearMul", MICROSOFT)(partial(elementwise, operands=[0, 3]))
rule("QLinearSigmoid QLinearLeakyRelu", MICROSOFT)(partial(elementwise, operands=[0]))
rule("QLinearWhere", MICROSOFT)(partial(elementwise, operands=[0, 1, 4]))


@rule("BiasSplitGelu", MICROSOFT)
def _bias_split(call: NodeCall) -> Moves:
    return Moves(inputs={0: kept(call.rank(0), "splits", [-1])}, dims=lambda trial: (*call.dims(0, trial)[:-1], None))


@rule("LabelEncoder Imputer Scaler Binarizer", "ai.onnx.ml")
def _features(call: NodeCall) -> Moves:
    rank = call.rank(0)
    targets = kept(rank) if rank > 1 else kept(rank, "takes for features", [0])
    return Moves(inputs={0: targets}, dims=dims_of(call))
