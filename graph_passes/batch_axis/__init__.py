"""Where the batch of a model lies, and a proof on its graph that samples do not mix.

    x (n, 64) --MatMul--> (n, 10) --Softmax, last axis--> y (n, 10)        proved: axis 0 of x and y
    x (n, 64) --ReduceMax, all axes--> m --> x / m                         ReduceMax 'm' reduces over the batch axis

`prove` follows the samples from the inputs through every operator by a table of rules. An operator that is not in the
table counts as one that mixes. numpy and onnx only; no weight is read, so its data may be missing.
"""

from graph_passes.batch_axis.find import find_batch_axes
from graph_passes.batch_axis.prove import Proof, prove

__all__ = ["Proof", "find_batch_axes", "prove"]
