"""Which axis of every input is the batch: guesses from names and sizes, and the first one that is proved.

x (batch, 10), state (2, batch, 128)      the symbol that inputs share
x (seq, batch, 32) into an LSTM           the LSTM takes its batch from axis 1
x (64) @ W                                no batch: the only axis meets weights
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx

from graph_passes.batch_axis.prove import prove

Axes = dict[str, int | None]

_LIKE_BATCH = re.compile(r"(?i)n|b|bs|bsz|n_?samples?|.*batch.*")
MOST_GUESSES = 12


def find_batch_axes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> Axes:
    """Return the batch axis of every input; None for an input without one.

    Where no guess is proved (samples mix, or an operator is not known), the first guess from names or first axes is
    taken whose axes are no features, channels or time steps.

    Args:
        model: weights in external files need not be there.
        shapes: input name -> a shape on which the model runs.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored and value.name in shapes]
    nothing: Axes = dict.fromkeys(shapes)
    fallback: Axes | None = None
    likely = [*_by_symbol(inputs, named=True), *_first(inputs, shapes), *_by_symbol(inputs, named=False)]
    guesses = _each_once([*likely, *_by_size(inputs, shapes)])
    for axes in guesses[:MOST_GUESSES]:
        proof = prove(model, axes, shapes)
        if proof.holds and any(proof.outputs.values()):
            return nothing | axes
        if not proof.holds and not proof.feature and fallback is None and axes in likely:
            fallback = axes
    return nothing | (fallback or {})


def _each_once(guesses: Iterable[Axes]) -> list[Axes]:
    """Return the guesses in order, without repetitions and those that name no axis."""
    found: list[Axes] = []
    for axes in guesses:
        if axes not in found and any(axis is not None for axis in axes.values()):
            found.append(axes)
    return found


def _by_symbol(inputs: Sequence[onnx.ValueInfoProto], *, named: bool) -> Iterator[Axes]:
    """Yield, for every symbol, the first axis of each input that has it; symbols of first axes come first."""
    symbols: dict[str, int] = {}
    for value in inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and bool(_LIKE_BATCH.fullmatch(dim.dim_param)) == named:
                symbols[dim.dim_param] = min(axis, symbols.get(dim.dim_param, axis))
    for symbol in sorted(symbols, key=symbols.__getitem__):
        yield {
            value.name: next(
                (at for at, dim in enumerate(value.type.tensor_type.shape.dim) if dim.dim_param == symbol), None
            )
            for value in inputs
        }


def _first(inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int]]) -> Iterator[Axes]:
    """Yield the first axis of every input that has one, where their sizes agree."""
    found = [value for value in inputs if shapes[value.name]]
    dynamic = [_is_dynamic(value, 0) for value in found]
    if found and (all(dynamic) or not any(dynamic)) and len({shapes[value.name][0] for value in found}) == 1:
        yield {value.name: 0 for value in found}
    if any(dynamic) and not all(dynamic):
        yield {value.name: 0 for value, yes in zip(found, dynamic, strict=True) if yes}


def _by_size(inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int]]) -> Iterator[Axes]:
    """Yield, for every axis of the first input, the first axis of each input that has the same size and kind."""
    first = next((value for value in inputs if shapes[value.name]), None)
    if first is None:
        return
    for axis, size in enumerate(shapes[first.name]):
        dynamic = _is_dynamic(first, axis)
        guess: Axes = {}
        for value in inputs:
            same = [
                at for at, other in enumerate(shapes[value.name]) if other == size and _is_dynamic(value, at) == dynamic
            ]
            guess[value.name] = axis if value is first else axis if axis in same else next(iter(same), None)
        yield guess


def _is_dynamic(value: onnx.ValueInfoProto, axis: int) -> bool:
    dims = value.type.tensor_type.shape.dim
    return axis < len(dims) and not (dims[axis].HasField("dim_value") and dims[axis].dim_value > 0)
