"""What an operator needs of its operands, and returns, when channels of one of them come in another order.

    Relu(x)             x permuted                        -> y permuted
    Add(x, b)           x and b permuted                  -> y permuted
    MatMul(x, B)        x and the rows of B permuted      -> y as before
    ReduceSum(x)        x permuted                        -> y as before

An operator that keeps samples apart along an axis treats every entry of the axis alike, so a permutation passes it just
as a batch does: `axis_rules` says where. The rules here add operators that read the permuted axis as a whole.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from graph_passes.axis_rules.moves import MICROSOFT, Moves
from graph_passes.axis_rules.shapes import inferred
from graph_passes.axis_rules.values import BatchPlace, Dims, MixesError, NodeCall, Value
from graph_passes.operators import AXIS_RULES, operator_of

POSITIONS = -1
"""In place of an axis: the numbers in the operand are positions along the permuted axis."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The condition on which a node's outputs differ by a permutation alone, and where.

    Attributes:
        needs: input index -> the axis along which it must be permuted; the other inputs stay as they are.
        outputs: output index -> the axis along which it is permuted; the other outputs stay as they are.
    """

    needs: Mapping[int, BatchPlace]
    outputs: Mapping[int, BatchPlace] = field(default_factory=dict)


Rule: TypeAlias = Callable[[NodeCall, int, BatchPlace], Effect | None]
"""(call, permuted input, its place) -> the effect; None where `axis_rules` decides."""


def effect_of(call: NodeCall, index: int) -> Effect:
    """Return the effect of a node on a permutation along an axis of its input `index`.

    Raises:
        MixesError: A permutation cannot pass the node.
    """
    value, operator = call.inputs[index], operator_of(call.node.domain, call.node.op_type)
    if value is None or value.place is None:
        raise ValueError(f"input {index} of {call.label} is not permuted")
    effect = RULES[operator](call, index, value.place) if operator in RULES else None
    return _along(call, index, value.place) if effect is None else effect


def shapes_of(call: NodeCall) -> list[tuple[int, Dims | None]]:
    """Return element type and shape of every output of a node; (0, None) where they do not follow from its inputs."""
    found = inferred(call) if call.node.domain == "" else [(0, None)] * len(call.node.output)
    try:
        moves: Sequence[Moves | Value | None] = _moves(call)
    except MixesError:
        moves = [None] * len(found)
    made: list[tuple[int, Dims | None]] = []
    for (kind, shapes), each in zip(found, moves, strict=True):
        dims = each.dims(0) if shapes is None and isinstance(each, Moves) and each.dims is not None else None
        made.append((kind, dims if shapes is None else shapes[0]))
    return made


def _moves(call: NodeCall) -> Sequence[Moves | Value]:
    """Return how every output of a node moves axes."""
    rule = AXIS_RULES.get(operator_of(call.node.domain, call.node.op_type))
    if rule is None or call.node.domain == "ai.onnx.ml":  # which has numbers of channels in attributes
        raise call.mixes("is an unknown operator")
    try:
        moves = rule(call)
    except MixesError as error:  # its text is about batches
        raise call.mixes("does not treat all entries of the permuted axis alike") from error
    return [moves] * len(call.node.output) if isinstance(moves, Moves) else moves


def _target(call: NodeCall, index: int, place: BatchPlace) -> int | str:
    """Return the axis of the first output to which the permuted axis goes, or what the operator does along it."""
    first = _moves(call)[0]
    return first.inputs[index][place.axis] if isinstance(first, Moves) and index in first.inputs else "reshapes"


def _along(call: NodeCall, index: int, place: BatchPlace) -> Effect:
    """Return the effect of a node that treats every entry of the axis alike."""
    needs: dict[int, BatchPlace] = {index: place}
    outputs: dict[int, BatchPlace] = {}
    for at, moves in enumerate(_moves(call)):
        if isinstance(moves, Value):
            if moves.place is not None:
                outputs[at] = moves.place
            continue
        target = moves.inputs[index][place.axis] if index in moves.inputs else "depends on"
        if isinstance(target, str):
            raise call.mixes(f"{target} the permuted axis")
        outputs[at] = replace(place, axis=target)
        for other, targets in moves.inputs.items():
            for axis in (axis for axis, each in enumerate(targets) if each == target):
                if other != index and _is_long(call, other, axis):
                    needs[other] = replace(place, axis=axis)
    if not outputs:
        raise call.mixes("has no permuted output")
    return Effect(needs=needs, outputs=outputs)


def _is_long(call: NodeCall, index: int, axis: int) -> bool:
    """Return whether an operand may have more than one entry along an axis: one alone is broadcast."""
    value = call.value(index)
    return value is not None and (value.shapes is None or value.shapes[0][axis] != 1)


def _product(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Permute the axes that are summed over."""
    (moves,) = _moves(call)
    if not isinstance(moves, Moves) or not isinstance(moves.inputs[index][place.axis], str):
        return None
    needs = {
        other: replace(place, axis=axis)
        for other, targets in moves.inputs.items()
        for axis, target in enumerate(targets)
        if isinstance(target, str)
    }
    return Effect(needs=needs)


def _reduction(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """End at a reduction over the axis."""
    return Effect(needs={index: place}) if isinstance(_target(call, index, place), str) else None


def _symmetric(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Pass an operator that divides every entry by something that does not depend on their order."""
    is_inside = isinstance(_target(call, index, place), str)
    return Effect(needs={index: place}, outputs={0: place}) if is_inside else None


def _shape(call: NodeCall, index: int, place: BatchPlace) -> Effect:
    return Effect(needs={index: place})


def _norm_of_channels(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Permute the vectors of a BatchNormalization or InstanceNormalization, which has one output."""
    if index != 0 or place.axis != 1 or any(call.node.output[1:]):
        return None
    vectors = {at: replace(place, axis=0) for at in range(1, len(call.inputs))}
    return Effect(needs={0: place, **vectors}, outputs={0: place})


def _norm_of_last(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Permute every operand of a LayerNormalization and the like; statistics, in outputs 1 and 2, do not change."""
    if isinstance(_target(call, index, place), int):
        return None
    needs, rank = {index: place}, call.rank(0)
    for other, value in enumerate(call.inputs):
        axis = place.axis if value is None else place.axis - rank + call.rank(other)
        if value is not None and axis >= 0 and _is_long(call, other, axis):
            needs[other] = replace(place, axis=axis)
    return Effect(needs=needs, outputs={at: place for at in (0, 3) if at < len(call.node.output)})


def _conv(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Permute the input channels of a Conv with one group, or every channel of a depthwise one."""
    if index != 0 or place.axis != 1:
        return None
    groups, (outputs, *_) = call.attribute("group", 1), call.dims(1, 0) or (None,)
    if groups == 1:
        return Effect(needs={0: place, 1: place})
    if groups != place.outer * place.inner * call.sizes[0] or outputs is None or outputs % groups:
        return None
    channels = replace(place, inner=place.inner * (outputs // groups))
    needs = {0: place} | {at: replace(channels, axis=0) for at in (1, 2) if call.value(at) is not None}
    if call.value(3) is not None:
        needs[3] = channels  # the sum Z of a FusedConv
    return Effect(needs=needs, outputs={0: channels})


def _conv_transpose(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Permute the input channels of a ConvTranspose with one group."""
    if index != 0 or place.axis != 1 or call.attribute("group", 1) != 1:
        return None
    return Effect(needs={0: place, 1: replace(place, axis=0)})


def _projection(call: NodeCall, index: int, place: BatchPlace, *, columns: int) -> Effect | None:
    """Permute the axis `columns` of the packed weight in input 1, which multiplies the features of input 0."""
    if index != 0 or place.axis != 2:
        return None
    return Effect(needs={0: place, 1: replace(place, axis=columns)})


def _gather(call: NodeCall, index: int, place: BatchPlace) -> Effect | None:
    """Look up the permuted positions."""
    if index != 0 or call.axis(call.rank(0), default=0) != place.axis:
        return None
    return Effect(needs={0: place, 1: replace(place, axis=POSITIONS)})


_FAMILIES: Iterable[tuple[str, str, Rule]] = (
    ("MatMul Gemm", "", _product),
    ("FusedMatMul FusedGemm GemmFastGelu", MICROSOFT, _product),
    ("Conv", "", _conv),
    ("FusedConv", MICROSOFT, _conv),
    ("ConvTranspose", "", _conv_transpose),
    ("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd", "", _reduction),
    ("ReduceSum ReduceSumSquare", "", _reduction),
    ("Softmax LogSoftmax LpNormalization MeanVarianceNormalization", "", _symmetric),
    ("BatchNormalization InstanceNormalization", "", _norm_of_channels),
    ("LayerNormalization RMSNormalization SimplifiedLayerNormalization", "", _norm_of_last),
    ("SkipLayerNormalization SkipSimplifiedLayerNormalization", MICROSOFT, _norm_of_last),
    ("LSTM GRU RNN", "", partial(_projection, columns=2)),
    ("Attention", MICROSOFT, partial(_projection, columns=0)),
    ("Gather", "", _gather),
    ("Shape Size", "", _shape),
)

RULES: Mapping[tuple[str, str], Rule] = {
    (domain, name): rule for names, domain, rule in _FAMILIES for name in names.split()
}
"""(domain, operator) -> its rule; the other operators let a permutation pass as they let a batch pass."""
