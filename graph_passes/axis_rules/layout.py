"""Rules of operators that move, join, cut and pick entries without computing.

A Reshape keeps samples apart where each of them stays one run of entries after as many others as before:
    (samples, 12, 64) -> (samples*12, 64)      axis 0, inner 12
    (5, samples, 64)  -> (5*samples, 64)       axis 0, outer 5
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graph_passes.axis_rules.moves import (
    MICROSOFT,
    Moves,
    Target,
    aligned,
    kept,
    rule,
    same_everywhere,
    settled,
    unknown_dims,
)
from graph_passes.axis_rules.shapes import inferred, of_arrays
from graph_passes.axis_rules.values import Array, BatchPlace, Dims, NodeCall, Value

FAR = 1 << 24
"""An end of a Slice from here on is the end of any axis."""


@rule("Transpose")
def _transpose(call: NodeCall) -> Moves:
    rank = call.rank(0)
    order = call.attribute("perm", list(reversed(range(rank))))
    return Moves(inputs={0: [list(order).index(axis) for axis in range(rank)]})


@rule("Squeeze")
def _squeeze(call: NodeCall) -> Moves:
    rank, axes = call.rank(0), call.axes(1)
    if axes is None:
        raise call.mixes("removes every axis of size 1, the batch too where it is 1; name its axes")
    gone = {axis % rank for axis in axes}
    left = [axis for axis in range(rank) if axis not in gone]
    return Moves(
        inputs={0: [left.index(axis) if axis in left else "removes" for axis in range(rank)]},
        dims=lambda trial: tuple(call.dims(0, trial)[axis] for axis in left),
    )


@rule("Unsqueeze")
def _unsqueeze(call: NodeCall) -> Moves:
    rank, axes = call.rank(0), call.axes(1) or ()
    output = rank + len(axes)
    added = {axis % output for axis in axes}
    return Moves(inputs={0: [axis for axis in range(output) if axis not in added]})


@rule("Reshape Flatten")
def _reshape(call: NodeCall) -> list[Value]:
    value = call.inputs[0]
    ((kind, shapes),) = inferred(call)
    if value is None or value.place is None:
        raise call.mixes("computes with the size of the batch")
    if len(call.inputs) > 1 and (shape := call.value(1)) is not None and shape.place is not None:
        raise call.mixes("takes its shape from samples")
    if shapes is None or value.shapes is None:
        raise call.mixes("has a shape that is not known before it runs")
    place = _reshaped(value.shapes[0], value.place, shapes[0], call.sizes[0])
    if place is None:
        axis = f"the batch axis (axis {value.place.axis} of {call.input_name(0)})"
        raise call.mixes(f"cuts {axis} in pieces that are no samples, or its shape is not known before it runs")
    return [settled(call, place, kind or value.kind, shapes)]


def _reshaped(before: Dims, place: BatchPlace, after: Dims, size: int) -> BatchPlace | None:
    """Return where the samples lie after a reshape; None where it cuts them."""
    lead = math.prod(-1 if dim is None else dim for dim in before[: place.axis]) * place.outer
    passed = 1
    for axis, dim in enumerate(after):
        if lead < 0 or dim is None or passed == 0:
            return None
        outer, rest = divmod(lead, passed)
        if rest == 0 and outer and dim and dim % (outer * size) == 0:
            return BatchPlace(axis, outer, dim // (outer * size))
        passed *= dim
    return None


@rule("Expand ConstantOfShape")
def _expand(call: NodeCall) -> list[Value]:
    ((kind, shapes),) = inferred(call)
    value = call.inputs[0] if call.node.op_type == "Expand" else Value(shapes=((),) * len(call.sizes))
    if any(each is not None and each.place is not None for each in call.inputs[call.node.op_type == "Expand" :]):
        raise call.mixes("takes its shape from samples")
    if value is None or value.shapes is None or shapes is None:
        raise call.mixes("has a shape that is not known before it runs")
    rank = len(shapes[0])
    if value.place is not None:
        return [settled(call, replace(value.place, axis=rank - len(value.shapes[0]) + value.place.axis), kind, shapes)]
    grown = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1 or sizes[0] is None]
    if not grown:
        return [Value(kind=kind, shapes=shapes)]
    return [_filled(call, value, kind, shapes, grown)]


def _filled(call: NodeCall, value: Value, kind: int, shapes: tuple[Dims, ...], grown: Sequence[int]) -> Value:
    """Repeat a constant along an axis that grows with the batch."""
    (axis, *others) = grown
    first = shapes[0][axis]
    at = axis - len(shapes[0]) + len(value.shapes[0] if value.shapes else ())
    uniform = value.data is not None and same_everywhere(value.data)
    repeated = at < 0 or (value.shapes is not None and all(dims[at] == 1 for dims in value.shapes))
    if others or first is None or first % call.sizes[0] or not (repeated or uniform):
        raise call.mixes("repeats constants along an axis that does not grow as the batch does")
    return settled(call, BatchPlace(axis, 1, first // call.sizes[0]), kind, shapes)


@rule("Tile")
def _tile(call: NodeCall) -> Moves:
    repeats = call.constant(1)
    if repeats is None:
        raise call.mixes("repeats as often as the batch is large, or as its inputs say")
    moved = [axis for axis, times in enumerate(repeats) if times != 1]
    return Moves(inputs={0: kept(call.rank(0), "repeats", moved)})


@rule("Shape Size")
def _shape(call: NodeCall) -> list[Value]:
    value = call.inputs[0]
    if value is None or value.shapes is None or any(None in dims for dims in value.shapes):
        rank = None if value is None else value.rank
        known: tuple[Dims, ...] | None = None if rank is None else ((rank,),) * len(call.sizes)
        return [Value(kind=7, shapes=known, counted=value is not None and not value.free)]
    start, end = call.attribute("start", 0), call.attribute("end", FAR)
    made: list[Array] = []
    for dims in value.shapes:
        sizes = np.array(dims, np.int64)
        made.append(sizes[start:end] if call.node.op_type == "Shape" else np.array(math.prod(sizes.tolist())))
    return [of_arrays(made, 7)]


@rule("Concat")
def _concat(call: NodeCall) -> Moves:
    rank = call.rank(0)
    axis = call.axis(rank, default=1)
    return Moves(
        inputs={index: kept(rank, "joins along", [axis]) for index in range(len(call.inputs))},
        dims=unknown_dims(rank),
        strict=True,
    )


@rule("QLinearConcat", MICROSOFT)
def _quantized_concat(call: NodeCall) -> Moves:
    """Read scale and zero point of the output, then each operand with its own two."""
    rank, parts = call.rank(2), range(2, len(call.inputs), 3)
    axis = call.axis(rank, default=1)

    def dims(trial: int) -> Dims:
        each = [
            value.shapes[trial] for at in parts if (value := call.value(at)) is not None and value.shapes is not None
        ]
        sizes = [dims[axis] for dims in each]
        whole = None if None in sizes else sum(size for size in sizes if size is not None)
        return (*each[0][:axis], whole, *each[0][axis + 1 :])

    return Moves(inputs={index: kept(rank, "joins along", [axis]) for index in parts}, dims=dims, strict=True)


@rule("Split")
def _split(call: NodeCall) -> Moves:
    rank = call.rank(0)
    return Moves(inputs={0: kept(rank, "splits", [call.axis(rank, default=0)])}, dims=unknown_dims(rank))


@rule("Slice")
def _slice(call: NodeCall) -> Moves:
    rank, value = call.rank(0), call.value(0)
    if value is None or value.shapes is None:
        raise call.mixes("has an input of unknown shape")
    starts, ends, axes, steps = (_limits(call, index, name) for index, name in enumerate(_LIMITS, 1))
    if starts is None or ends is None:
        raise call.mixes("has no starts or no ends")
    along = range(len(starts[0])) if axes is None else [int(axis) % rank for axis in axes[0]]
    cut = []
    for at, axis in enumerate(along):
        whole = all(int(start[at]) == 0 for start in starts) and (steps is None or int(steps[0][at]) == 1)
        reached = all(int(end[at]) >= FAR or int(end[at]) == d[axis] for end, d in zip(ends, value.shapes, strict=True))
        if len({int(limit[at]) for limit in ends}) > 1 and not (whole and reached):
            raise call.mixes(f"cuts axis {axis} of {call.input_name(0)} where the size of the batch says")
        if not (whole and reached):
            cut.append(axis)
    return Moves(inputs={0: kept(rank, "cuts pieces out of", cut)}, dims=unknown_dims(rank), arguments=frozenset({2}))


_LIMITS = ("starts", "ends", "axes", "steps")


def _limits(call: NodeCall, index: int, name: str) -> list[Array] | None:
    """Return limits of a Slice for every trial size; None where there are none."""
    value, written = call.value(index), call.attribute(name)
    if value is None:
        return None if written is None else [np.array(written)] * len(call.sizes)
    if value.data is None or value.place is not None or (value.counted and name != "ends"):
        raise call.mixes(f"takes {name} that are not known before it runs")
    return [data.reshape(-1) for data in value.data]


@rule("Gather")
def _gather(call: NodeCall) -> Moves:
    data, indices = call.rank(0), call.rank(1)
    axis = call.axis(data, default=0)
    first: list[Target] = [*range(axis), "picks entries along", *(at + indices - 1 for at in range(axis + 1, data))]
    return Moves(inputs={0: first, 1: [axis + at for at in range(indices)]}, dims=unknown_dims(data + indices - 1))


@rule("GatherElements")
def _gather_elements(call: NodeCall) -> Moves:
    data, indices = call.value(0), call.value(1)
    rank, axis = call.rank(0), call.axis(call.rank(0), default=0)
    if data is not None and data.free and indices is not None and indices.place is not None:
        return Moves(inputs={1: [at if at == axis else "reads constants place by place along" for at in range(rank)]})
    targets = kept(rank, "picks entries along", [axis])
    return Moves(inputs={0: targets, 1: targets}, strict=True)


@rule("GatherND")
def _gather_nd(call: NodeCall) -> Moves:
    data, indices, batch = call.rank(0), call.rank(1), int(call.attribute("batch_dims", 0))
    value = call.value(1)
    depth = None if value is None or value.shapes is None else value.shapes[0][-1]
    if depth is None:
        raise call.mixes("takes indices of unknown shape")
    first: list[Target] = [*range(batch), *["picks entries along"] * depth]
    first += [indices - 1 + at for at in range(data - batch - depth)]
    second: list[Target] = [*range(indices - 1), "reads indices along"]
    return Moves(inputs={0: first, 1: second}, strict=batch > 0)


@rule("ScatterElements Scatter")
def _scatter_elements(call: NodeCall) -> Moves:
    rank = call.rank(0)
    targets = kept(rank, "writes entries along", [call.axis(rank, default=0)])
    return Moves(inputs=dict.fromkeys(range(3), targets), strict=True)


@rule("ScatterND")
def _scatter_nd(call: NodeCall) -> Moves:
    rank, indices, value = call.rank(0), call.rank(1), call.value(1)
    depth = None if value is None or value.shapes is None else value.shapes[0][-1]
    if depth is None:
        raise call.mixes("takes indices of unknown shape")
    updates: list[Target] = ["writes entries along"] * (indices - 1)
    updates += [depth + at for at in range(rank - depth)]
    return Moves(inputs={0: kept(rank, "writes entries along", range(depth)), 2: updates}, strict=True)


@rule("Pad")
def _pad(call: NodeCall) -> Moves:
    rank, axes = call.rank(0), call.axes(3)
    pads = call.attribute("pads") or call.attribute("paddings")
    if pads is None:
        written = call.constant(1)
        if written is None:
            raise call.mixes("takes pads that are not constant")
        pads = written.tolist()
    half = len(pads) // 2
    along = range(rank) if axes is None else axes
    changed = [axis for at, axis in enumerate(along) if pads[at] or pads[half + at]]
    return Moves(inputs={0: kept(rank, "pads", changed)}, dims=unknown_dims(rank))


@rule("Resize Upsample")
def _resize(call: NodeCall) -> Moves:
    rank = call.rank(0)
    ((_, shapes),) = inferred(call)
    value = call.value(0)
    if call.attribute("coordinate_transformation_mode", b"") == b"tf_crop_and_resize" or shapes is None:
        raise call.mixes("resizes to a shape that is not known before it runs")
    before = value.shapes if value is not None and value.shapes is not None else shapes
    changed = [
        axis
        for axis in range(rank)
        if any(a[axis] != b[axis] or a[axis] is None for a, b in zip(before, shapes, strict=True))
    ]
    arguments = frozenset({3}) if call.node.op_type == "Resize" else frozenset()
    return Moves(inputs={0: kept(rank, "resizes", changed)}, arguments=arguments)


@rule("OneHot")
def _one_hot(call: NodeCall) -> Moves:
    rank = call.rank(0)
    axis = call.axis(rank + 1)
    return Moves(inputs={0: [at + (at >= axis) for at in range(rank)]}, dims=unknown_dims(rank + 1))


@rule("Trilu")
def _trilu(call: NodeCall) -> Moves:
    return Moves(inputs={0: kept(call.rank(0), "cuts a triangle along", [-2, -1])})


@rule("Compress")
def _compress(call: NodeCall) -> Moves:
    rank, axis = call.rank(0), call.attribute("axis")
    along = range(rank) if axis is None else [axis]
    return Moves(inputs={0: kept(rank, "leaves entries out along", along)}, dims=unknown_dims(rank))


@rule("ReverseSequence")
def _reverse(call: NodeCall) -> Moves:
    rank, batch = call.rank(0), int(call.attribute("batch_axis", 1))
    return Moves(inputs={0: kept(rank, "reverses", [call.axis(rank, "time_axis", 0)]), 1: [batch]})


@rule("Optional OptionalGetElement")
def _same(call: NodeCall) -> Moves:
    return Moves(inputs={0: aligned(call.rank(0), call.rank(0))})
