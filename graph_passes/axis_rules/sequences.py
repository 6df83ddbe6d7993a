"""Rules of recurrent layers and attention, which know by themselves where their batch lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graph_passes.axis_rules.moves import CHANNELS, MICROSOFT, STEPS, Moves, Target, only, rule
from graph_passes.axis_rules.values import Dims, NodeCall

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
        made.append(Moves(inputs=_there(call, inputs), dims=lambda _, rank=4 if index == 0 else 3: (None,) * rank))  # type: ignore[misc]
    return made


def _there(call: NodeCall, inputs: Mapping[int, Sequence[Target]]) -> dict[int, Sequence[Target]]:
    """Those inputs that are not left out, cut to their rank."""
    return {
        index: list(targets)[: call.rank(index)] for index, targets in inputs.items() if call.value(index) is not None
    }


FIRST: Sequence[Target] = (0, *[ATTENDS] * 4)
SECOND: Sequence[Target] = (PREVIOUS, 0, *[ATTENDS] * 4)


def _attention(call: NodeCall, inputs: Mapping[int, Sequence[Target]], ranks: Sequence[int]) -> list[Moves]:
    """Moves of an attention: all outputs have the batch first, but for `present` of rank 5, which has it second."""
    made = []
    for index in range(len(call.node.output)):
        rank = ranks[index] if index < len(ranks) else 4
        second = rank == 5
        there = _there(call, inputs)
        if second:
            there = {at: [1 if axis == 0 else axis for axis in targets] for at, targets in there.items()}
        dims: Dims = (None,) * rank
        made.append(Moves(inputs=there, dims=lambda _, dims=dims: dims))  # type: ignore[misc]
    return made


def _mask(call: NodeCall, index: int) -> Sequence[Target]:
    """A mask that is broadcast to (batch, heads, queries, keys)."""
    rank = call.rank(index) if call.value(index) is not None else 0
    return [axis if axis == 0 else ATTENDS for axis in range(4 - rank, 4)]


@rule("Attention")
def _standard_attention(call: NodeCall) -> list[Moves]:
    inputs = {0: FIRST, 1: FIRST, 2: FIRST, 3: _mask(call, 3), 4: FIRST, 5: FIRST, 6: FIRST}
    return _attention(call, inputs, [call.rank(0)])


@rule("QAttention", MICROSOFT)
def packed_attention(call: NodeCall) -> list[Moves]:
    """Axes of an attention with packed projections, quantized or not."""
    if call.node.op_type == "QAttention":
        return _attention(call, {0: FIRST, 5: FIRST, 8: SECOND}, [3, 5])
    inputs = {0: FIRST, 3: FIRST, 4: SECOND, 5: FIRST}
    return _attention(call, inputs, [3, 5])


@rule("MultiHeadAttention", MICROSOFT)
def _multi_head(call: NodeCall) -> list[Moves]:
    return _attention(call, dict.fromkeys((0, 1, 2, 4, 5, 6, 7), FIRST), [3])


@rule("GroupQueryAttention", MICROSOFT)
def _grouped(call: NodeCall) -> list[Moves]:
    return _attention(call, dict.fromkeys((0, 1, 2, 3, 4, 5, 9, 10), FIRST), [3])


@rule("RotaryEmbedding")
def _rotary(call: NodeCall) -> Moves:
    tables = 3 if call.value(3) is not None else 0
    inputs = {0: FIRST, 3: FIRST, **({} if tables else {1: FIRST, 2: FIRST})}
    return Moves(inputs=_there(call, inputs))


@rule("RotaryEmbedding", MICROSOFT)
def _rotary_of_runtime(call: NodeCall) -> Moves:
    value = call.value(0)
    return Moves(
        inputs=_there(call, {0: FIRST, 1: FIRST}),
        dims=lambda trial: value.shapes[trial] if value is not None and value.shapes is not None else (),
    )


@rule("EmbedLayerNormalization", MICROSOFT)
def _embed(call: NodeCall) -> list[Moves]:
    inputs = _there(call, {0: (0, 1), 1: (0, 1), 7: (0, ATTENDS), 8: (0, 1)})
    hidden: Sequence[Dims] = ((None, None, None), (None,), (None, None, None))
    made = []
    for index in range(len(call.node.output)):
        of_mask = index == 1
        cut = {at: [ATTENDS if of_mask and axis == 1 else axis for axis in targets] for at, targets in inputs.items()}
        made.append(Moves(inputs=cut, dims=lambda _, dims=hidden[index]: dims))  # type: ignore[misc]
    return made
