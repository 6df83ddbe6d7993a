"""Rules of values that count samples: `arange(n)`, with which exporters pick the entries of each sample.

    Range(0, n) * 12 + [0..11]           sample b holds 12 b + something in 0..11: it picks out of block b
    GatherND(mask (n, 16), [b, t])       sample b picks from row b

Such a value differs from sample to sample, so it may only pick from samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from graph_passes.axis_rules.moves import same_everywhere, settled
from graph_passes.axis_rules.shapes import inferred, of_arrays
from graph_passes.axis_rules.values import MOST_NUMBERS, BatchPlace, NodeCall, Rows, Value

Plain = Callable[[NodeCall], Sequence[Value]]
"""A function that returns the outputs of a call whose inputs count nothing."""

KEEPING = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
COMPARING = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
COMPUTING = ("Add", "Max", "Min", "Mod", "Mul", "Sub", *COMPARING)
UNKNOWN = Rows()


def ranged(call: NodeCall) -> Value:
    """Return the output of a Range: the number of each sample where it is as long as the batch."""
    kind = 0 if call.inputs[0] is None else call.inputs[0].kind
    limits = [value.data for value in call.inputs if value is not None and value.data is not None]
    if len(limits) != 3:
        return Value(kind=kind, shapes=((None,),) * len(call.sizes), counted=not all(map(_free, call.inputs)))
    lengths = [max(math.ceil((end - start) / step), 0) for start, end, step in zip(*limits, strict=True)]
    shapes = tuple((length,) for length in lengths)
    start, step = call.constant(0), call.constant(2)
    if start is not None and step is not None and lengths == list(call.sizes) and len(lengths) > 1:
        rows = Rows(step=int(step), low=int(start), high=int(start))
        return Value(kind=kind, shapes=shapes, place=BatchPlace(0), rows=(rows,))
    if max(lengths) > MOST_NUMBERS:
        return Value(kind=kind, shapes=shapes, counted=not all(map(_free, call.inputs)))
    return of_arrays([np.arange(*each).astype(limits[0][0].dtype) for each in zip(*limits, strict=True)], kind)


def _free(value: Value | None) -> bool:
    return value is None or value.free


def numbered(call: NodeCall, plain: Plain) -> Sequence[Value]:
    """Return the outputs of a call with inputs that count samples.

    Raises:
        MixesError: it does not pick from samples with them.
    """
    op_type = call.node.op_type
    rows = [value.rows if value is not None else None for value in call.inputs]
    bare = replace(call, inputs=[value and replace(value, rows=None) for value in call.inputs])
    if call.node.domain in ("", "ai.onnx"):
        if op_type in ("Shape", "Size"):
            return plain(bare)
        if op_type in KEEPING and rows[0] is not None and not any(rows[1:]):
            return [replace(value, rows=rows[0]) for value in plain(bare)]
        beside = [value for value in call.inputs if value is not None and value.rows is None]
        if op_type in COMPUTING and all(value.place is None for value in beside):
            return [replace(value, rows=(_computed(call),)) for value in plain(bare)]
        if op_type == "Concat" and call.axis(call.rank(0), default=1) == call.rank(0) - 1:
            return [replace(plain(bare)[0], rows=_columns(call))]
        if op_type == "Gather" and not rows[0]:
            return _gather(call)
        if op_type == "GatherND" and not rows[0]:
            return _gather_nd(call)
    raise call.mixes("computes with the number that a sample has in its batch")


def _computed(call: NodeCall) -> Rows:
    """Return the number of a sample, times or plus constants."""
    first, second = call.inputs
    if call.node.op_type == "Sub" or first is None or second is None or (first.rows and second.rows):
        return UNKNOWN
    counting, other = (first, second) if first.rows else (second, first)
    rows = counting.rows[0] if counting.rows is not None and len(counting.rows) == 1 else None
    if rows is None or rows.step is None or other.data is None or not other.free:
        return UNKNOWN
    low, high = int(other.data[0].min(initial=0)), int(other.data[0].max(initial=0))
    if call.node.op_type == "Add":
        return Rows(step=rows.step, low=rows.low + low, high=rows.high + high)
    if call.node.op_type == "Mul" and same_everywhere(other.data):
        factor = int(other.data[0].reshape(-1)[0])
        ends = sorted((rows.low * factor, rows.high * factor))
        return Rows(step=rows.step * factor, low=ends[0], high=ends[1])
    return UNKNOWN


def _columns(call: NodeCall) -> tuple[Rows | None, ...]:
    """Return how the columns of joined indices count; each input must be one column."""
    found = []
    for index, value in enumerate(call.inputs):
        if value is None or value.shapes is None or value.shapes[0][-1] != 1 or len(value.rows or "1") != 1:
            raise call.mixes(f"joins the number of a sample with {call.input_name(index)}, which is no column")
        found.append(None if value.rows is None else value.rows[0])
    return tuple(found)


def _gather(call: NodeCall) -> Sequence[Value]:
    data, indices = call.inputs
    axis = call.axis(call.rank(0), default=0)
    if data is None or indices is None or indices.place is None or data.place is None or data.place.axis != axis:
        raise call.mixes("picks constants by the number that a sample has in its batch")
    return [_picked(call, data.place, indices, indices.rows or (), axis + indices.place.axis)]


def _gather_nd(call: NodeCall) -> Sequence[Value]:
    data, indices = call.inputs
    if data is None or indices is None or indices.place is None or data.place is None or indices.rows is None:
        raise call.mixes("picks constants by the number that a sample has in its batch")
    column = data.place.axis - int(call.attribute("batch_dims", 0))
    if call.attribute("batch_dims", 0) or column >= len(indices.rows):
        raise call.mixes("picks by the number of a sample where samples do not lie")
    if any(rows is not None for at, rows in enumerate(indices.rows) if at != column):
        raise call.mixes("picks other axes by the number of a sample")
    return [_picked(call, data.place, indices, (indices.rows[column],), indices.place.axis)]


def _picked(call: NodeCall, place: BatchPlace, indices: Value, rows: Sequence[Rows | None], axis: int) -> Value:
    """Return the entries that each sample picks, where they are its own."""
    (own,) = rows if len(rows) == 1 else (None,)
    inside = own is not None and own.step == place.inner and own.low >= 0 and own.high < place.inner
    if not inside or place.outer != 1 or indices.place is None or not indices.place.plain:
        raise call.mixes("picks from one sample for another, or is not known not to")
    ((kind, shapes),) = inferred(call)
    return settled(call, BatchPlace(axis), kind, shapes)
