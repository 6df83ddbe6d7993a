"""MACs of recurrent layers.

LSTM, GRU, RNN    steps * batch * (numbers in W + numbers in R), both directions where there are two

With `layout=1` steps and batch change places, which changes no product. Shorter sequences (`sequence_lens`) count at
full length: how long they are is no property of the shapes. Peepholes and gates are element-wise and count nothing.
"""

from __future__ import annotations

import math

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator


def recurrent(node: ExecutedNode) -> Macs:
    """X (steps, batch, in), W (directions, gates * hidden, in), R (directions, gates * hidden, hidden)."""
    steps_and_batch = math.prod(node.input(0)[:2])
    return Macs(steps_and_batch * (math.prod(node.input(1)) + math.prod(node.input(2))))


FORMULAS: dict[Operator, Formula] = {
    ("", "GRU"): recurrent,
    ("", "LSTM"): recurrent,
    ("", "RNN"): recurrent,
    ("com.microsoft", "DynamicQuantizeLSTM"): recurrent,
}
