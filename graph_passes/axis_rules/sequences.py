"""Rules of recurrent layers and attention, whose batch axis is fixed by the operator."""

from collections.abc import Mapping, Sequence
from functools import partial

from graph_passes.axis_rules.moves import CHANNELS, MICROSOFT, STEPS, Moves, Target, dims_of, only, rule, unknown_dims
from graph_passes.axis_rules.values import NodeCall

ATTENDS = "attends along"
PREVIOUS = "keeps layers along"


@rule("LSTM GRU RNN")
def _recurrent(call: NodeCall) -> list[Moves]:
    batch_first = bool(call.attribute("layout", 0))
    rest = 0 if batch_first else 1  # the batch of X and of the states
    ys = 0 if batch_first else 2
    x = only(3, STEPS, {rest: 0})
    x[2] = CHANNELS
    made = []
    for index in range(len(call.node.output)):
        target = ys if index == 0 else rest
        inputs: dict[int, Sequence[Target]] = {0: [target if axis == 0 else axis for axis in x]}
        for state in (4, *([5, 6] if call.node.op_type == "LSTM" else [5])):
            inputs[state] = [target] if state == 4 else only(3, PREVIOUS, {rest: target})
        made.append(Moves(inputs=_there(call, inputs), dims=unknown_dims(4 if index == 0 else 3)))
    return made


def _there(call: NodeCall, inputs: Mapping[int, Sequence[Target]]) -> dict[int, Sequence[Target]]:
    """Return the inputs that are not left out, cut to their rank."""
    return {
        index: list(targets)[: call.rank(index)] for index, targets in inputs.items() if call.value(index) is not None
    }


FIRST: Sequence[Target] = (0, *[ATTENDS] * 4)
SECOND: Sequence[Target] = (PREVIOUS, 0, *[ATTENDS] * 4)


def _attention(call: NodeCall, inputs: Mapping[int, Sequence[Target]], ranks: Sequence[int]) -> list[Moves]:
    """Return the moves of an attention: the batch is first, but second in a `present` of rank 5."""
    made = []
    for index in range(len(call.node.output)):
        rank = ranks[index] if index < len(ranks) else 4
        second = rank == 5
        there = _there(call, inputs)
        if second:
            there = {at: [1 if axis == 0 else axis for axis in targets] for at, targets in there.items()}
        made.append(Moves(inputs=there, dims=unknown_dims(rank)))
    return made


def _mask(call: NodeCall, index: int) -> Sequence[Target]:
    """Return the targets of a mask that broadcasts to (batch, heads, queries, keys)."""
    rank = call.rank(index) if call.value(index) is not None else 0
    return [axis if axis == 0 else ATTENDS for axis in range(4 - rank, 4)]


@rule("Attention")
def _standard_attention(call: NodeCall) -> list[Moves]:
    inputs = {0: FIRST, 1: FIRST, 2: FIRST, 3: _mask(call, 3), 4: FIRST, 5: FIRST, 6: FIRST}
    return _attention(call, inputs, [call.rank(0)])


@rule("QAttention", MICROSOFT)
def packed_attention(call: NodeCall) -> list[Moves]:
    """Return the moves of an attention with packed projections, quantized or not."""
    if call.node.op_type == "QAttention":
        return _attention(call, {0: FIRST, 5: FIRST, 8: SECOND}, [3, 5])
    inputs = {0: FIRST, 3: FIRST, 4: SECOND, 5: FIRST}
    return _attention(call, inputs, [3, 5])


rule("MultiHeadAttention", MICROSOFT)(
    partial(_attention, inputs=dict.fromkeys((0, 1, 2, 4, 5, 6, 7), FIRST), ranks=[3])
)
rule("GroupQueryAttention", MICROSOFT)(
    partial(_attention, inputs=dict.fromkeys((0, 1, 2, 3, 4, 5, 9, 10), FIRST), ranks=[3])
)


@rule("RotaryEmbedding")
def _rotary(call: NodeCall) -> Moves:
    tables = 3 if call.value(3) is not None else 0
    inputs = {0: FIRST, 3: FIRST, **({} if tables else {1: FIRST, 2: FIRST})}
    return Moves(inputs=_there(call, inputs))


@rule("RotaryEmbedding", MICROSOFT)
def _rotary_of_runtime(call: NodeCall) -> Moves:
    return Moves(inputs=_there(call, {0: FIRST, 1: FIRST}), dims=dims_of(call))


@rule("EmbedLayerNormalization", MICROSOFT)
def _embed(call: NodeCall) -> list[Moves]:
    inputs = _there(call, {0: (0, 1), 1: (0, 1), 7: (0, ATTENDS), 8: (0, 1)})
    made = []
    for index in range(len(call.node.output)):
        of_mask = index == 1
        cut = {at: [ATTENDS if of_mask and axis == 1 else axis for axis in targets] for at, targets in inputs.items()}
        made.append(Moves(inputs=cut, dims=unknown_dims(1 if of_mask else 3)))
    return made
