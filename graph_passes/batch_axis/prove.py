"""The proof: samples lie along these axes of the inputs, and stay apart up to the outputs."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from graph_passes.axis_rules.values import BatchPlace, MixesError, Value
from graph_passes.batch_axis.walk import Walk

TRIAL_SIZES = (1994, 1)
"""Sizes of the batch for which shapes are followed: one that is unlikely to be a factor of another size, and 1.

Neither 1994 / 2 nor 1994 - 1 has divisors, so no remainder is that of 1. A comparison of a size with a number has
different results for the two."""

_PRIMES = (37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113, 127)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The result for one choice of batch axes.

    Attributes:
        reason: the first operator that mixes samples and what it does; "" where samples are proved independent.
        feature: whether an axis cannot be the batch: it holds features, channels or time steps.
        outputs: output name -> where its samples lie; None for an output that depends on none. Empty without a proof.
    """

    reason: str = ""
    feature: bool = False
    outputs: Mapping[str, BatchPlace | None] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Return whether samples are independent."""
        return not self.reason


def prove(
    model: onnx.ModelProto,
    axes: Mapping[str, int | None],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Proof:
    """Prove that samples along these axes of the inputs are independent of each other and of their number.

    Args:
        model: weights in external files need not be there.
        axes: input name -> its batch axis, None for an input without one. All of dynamic size, or all of fixed.
        shapes: input name -> a shape on which the model runs, for dynamic sizes beside the batch.

    Examples:
        >>> from onnx import parser
        >>> text = '<ir_version: 8, opset_import: ["": 18]> g (float[n, 4] x) => (float[n, 4] y) {'
        >>> prove(parser.parse_model(text + "y = Softmax<axis = 1>(x) }"), {"x": 0}).holds
        True
        >>> prove(parser.parse_model(text + "y = Softmax<axis = 0>(x) }"), {"x": 0}).reason
        "Softmax 'y' normalizes over the batch axis (axis 0 of 'x')"
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    try:
        sizes = _trial_sizes(inputs, axes)
        given, open_shapes = _inputs_of(inputs, axes, sizes, shapes or {})
        walk = Walk(model, sizes, open_shapes=open_shapes)
        made = walk.graph(model.graph, given, ChainMap())
    except MixesError as mixed:
        return Proof(reason=str(mixed), feature=mixed.feature)
    except (KeyError, RecursionError) as error:  # an undefined name, or endless recursion of functions
        return Proof(reason=f"the graph cannot be followed: {type(error).__name__} {error}"[:200])
    names = [value.name for value in model.graph.output]
    if counted := [name for name, value in zip(names, made, strict=True) if value.counted or value.rows]:
        return Proof(
            reason=f"output {counted[0]!r} follows from the size of the batch, or from a sample's number in it"
        )
    return Proof(outputs={name: value.place for name, value in zip(names, made, strict=True)})


def _trial_sizes(inputs: Sequence[onnx.ValueInfoProto], axes: Mapping[str, int | None]) -> tuple[int, ...]:
    """Return `TRIAL_SIZES` for a dynamic batch, the one size of a fixed batch."""
    fixed = set()
    for value in inputs:
        axis = axes.get(value.name)
        if axis is None:
            continue
        dims = value.type.tensor_type.shape.dim
        if axis >= len(dims):
            raise MixesError(f"input {value.name!r} has no axis {axis}", feature=True)
        fixed.add(int(dims[axis].dim_value) if dims[axis].HasField("dim_value") and dims[axis].dim_value > 0 else 0)
    if len(fixed) > 1:
        raise MixesError("the batch axes of the inputs have different sizes", feature=True)
    return tuple(fixed) if fixed and fixed != {0} else TRIAL_SIZES


def _inputs_of(
    inputs: Sequence[onnx.ValueInfoProto],
    axes: Mapping[str, int | None],
    sizes: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
) -> tuple[dict[str, Value], bool]:
    """Return the inputs, and whether sizes beside the batch are open; each symbol of those gets a size of its own."""
    symbols: dict[str, int] = {}
    batch = {
        value.type.tensor_type.shape.dim[axis].dim_param
        for value in inputs
        if (axis := axes.get(value.name)) is not None
    } - {""}
    given = {}
    for value in inputs:
        tensor, axis = value.type.tensor_type, axes.get(value.name)
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
            given[value.name] = Value(kind=tensor.elem_type)
            continue
        known = shapes.get(value.name, ())
        trials = []
        for size in sizes:
            dims = []
            for at, dim in enumerate(tensor.shape.dim):
                if at == axis or (dim.dim_param in batch and dim.dim_param):
                    dims.append(size)
                elif dim.HasField("dim_value") and dim.dim_value >= 0:
                    dims.append(int(dim.dim_value))
                elif len(known) == len(tensor.shape.dim):
                    dims.append(int(known[at]))
                else:
                    symbol = dim.dim_param or f"{value.name}?{at}"
                    dims.append(symbols.setdefault(symbol, _size(len(symbols))))
            trials.append(tuple(dims))
        given[value.name] = Value(
            kind=tensor.elem_type, shapes=tuple(trials), place=None if axis is None else BatchPlace(axis)
        )
    return given, bool(symbols)


def _size(number: int) -> int:
    """Return a size that no other symbol has and that halves often, for nets that shrink and grow again."""
    turns, at = divmod(number, len(_PRIMES))
    return 32 * _PRIMES[at] * (turns + 1)
