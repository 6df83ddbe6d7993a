"""MACs of recurrent layers.

LSTM, GRU, RNN    steps * batch * (numbers in W + numbers in R), both directions where there are two

With `layout=1` steps and batch change places, which changes no product. Shorter sequences (`sequence_lens`) count at
full length, for shapes do not show their length. Peepholes and gates are element-wise and count nothing.
"""

import math

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator


def recurrent(node: ExecutedNode) -> Macs:
    """Count X (steps, batch, in), W (directions, gates * hidden, in), R (directions, gates * hidden, hidden)."""
    steps_and_batch = math.prod(node.input(0)[:2])
    return Macs(steps_and_batch * (math.prod(node.input(1)) + math.prod(node.input(2))))


def attended_lstm(node: ExecutedNode) -> Macs:
    """Count AttnLSTM: an LSTM whose every step attends to a memory M (batch, length, depth).

    The memory is projected once (MW), the query at every step (QW); scores multiply V, the context mixes the memory,
    and the attention layer (AW) is optional.
    """
    memory, memory_weight, width = node.input(11), node.input(9), node.input(10)[-1]
    (steps, batch), directions = node.input(0)[:2], node.input(1)[0]
    weights = [shape for shape in map(node.find, (1, 2, 8, 13)) if shape is not None]
    return Macs(
        product=steps * batch * sum(math.prod(shape) for shape in weights)
        + memory[0] * memory[1] * math.prod(memory_weight),
        attention=directions * steps * batch * memory[1] * (width + memory[2]),
    )


FORMULAS: dict[Operator, Formula] = {
    ("", "GRU"): recurrent,
    ("", "LSTM"): recurrent,
    ("", "RNN"): recurrent,
    ("com.microsoft", "AttnLSTM"): attended_lstm,
    ("com.microsoft", "DynamicQuantizeLSTM"): recurrent,
}
