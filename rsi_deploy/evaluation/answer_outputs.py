"""Find the scores behind a graph's integer outputs, such as those of an ArgMax or TopK.

scores --ArgMax--> ids
scores --Softmax--> probabilities --TopK--> values, ids         best first
scores --ArgMax--> --Cast, Squeeze--> ids
values --Greater 0.5--> bool                                    no class ids, but the values can be compared
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto

logger = logging.getLogger(__name__)

FLOATING = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE))
WHOLE = frozenset(
    [TensorProto.BOOL, *(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64))]
)
SHAPE_BYTES = 4096
"""Initializers up to this size may hold a shape."""
_KEEPS_IDS = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
_KEEPS_ORDER = _KEEPS_IDS | {"LogSoftmax", "Sigmoid", "Softmax"}
_BEST = frozenset(("ArgMax", "ArgMin", "ReduceMax", "ReduceMin", "TopK"))

Producers = Mapping[str, NodeProto]


@dataclass(frozen=True, kw_only=True)
class ClassIds:
    """An output of class ids.

    Attributes:
        output: name of the output.
        source: value whose positions the ids are.
        ranked: whether the ids of a sample are a ranking, best first.
        scores: name of an output with those scores, or "".
        classes: number of classes; 0 if the graph does not say.
        values: outputs that hold only the best scores, not those of all classes.
    """

    output: str
    source: str
    ranked: bool
    scores: str
    classes: int
    values: tuple[str, ...]


def class_ids(model: ModelProto) -> ClassIds | None:
    """Return the first output of class ids, or None if no output comes from an ArgMax or TopK.

    Args:
        model: model, possibly without weights.
    """
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    for output in graph.output:
        node, origin = _maker(output.name, producers)
        if node is None or node.op_type not in ("ArgMax", "ArgMin", "TopK"):
            continue
        if node.op_type == "TopK" and list(node.output).index(origin) != 1:
            continue
        source = node.input[0]
        root = _root(source, producers)
        others = [value.name for value in graph.output if value.name != output.name]
        return ClassIds(
            output=output.name,
            source=source,
            ranked=node.op_type == "TopK",
            scores=next((name for name in others if _root(name, producers) == root), ""),
            classes=_classes(model, node),
            values=tuple(name for name in others if _is_best(name, root, producers)),
        )
    return None


def with_readable_output(model: ModelProto) -> ModelProto:
    """Add an output that shows how a model's answers change, if it returns ids or no floats at all.

    The new first output is the value before an ArgMax or TopK, or else before the first comparison or rounding. A
    model is returned unchanged if its first floating output is comparable, or if it has no such value.

    Args:
        model: model, possibly without weights; it is not changed.
    """
    graph = model.graph
    ids = class_ids(model)
    best = set(ids.values) if ids is not None else set()
    floats = [value for value in graph.output if _elem(value) in FLOATING]
    if floats and floats[0].name not in best:
        return model
    first = next((value for value in floats if value.name not in best), None)
    if first is None and (first := _read_before(model, ids)) is None:
        return model
    changed = ModelProto()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.append(first)
    changed.graph.output.extend(value for value in graph.output if value.name != first.name)
    return changed


def _read_before(model: ModelProto, ids: ClassIds | None) -> onnx.ValueInfoProto | None:
    """Return the nearest floating value from which integer outputs are computed."""
    producers = {name: node for node in model.graph.node for name in node.output if name}
    values = {value.name: value for value in _inferred(model)}
    kinds = {name: _elem(value) for name, value in values.items()}
    starts = [ids.source] if ids is not None else [v.name for v in model.graph.output if _elem(v) in WHOLE]
    found = next((name for start in starts for name in _floats_before(start, producers, kinds)), None)
    if found is None and ids is not None and ids.source in producers and not kinds.get(ids.source):
        return onnx.ValueInfoProto(name=ids.source)  # output of an operator that ONNX does not know
    return None if found is None else values[found]


def _maker(name: str, producers: Producers) -> tuple[NodeProto | None, str]:
    """Return the node that computes a value, ignoring casts and reshapes, and the value's name there."""
    node = producers.get(name)
    while node is not None and node.op_type in _KEEPS_IDS:
        name = node.input[0]
        node = producers.get(name)
    return node, name


def _root(name: str, producers: Producers) -> str:
    """Return the earliest value with the same order of elements, ignoring monotonic operators and reshapes."""
    node = producers.get(name)
    while node is not None and node.op_type in _KEEPS_ORDER:
        name = node.input[0]
        node = producers.get(name)
    return name


def _is_best(name: str, root: str, producers: Producers) -> bool:
    """Return whether a value is the largest of the scores `root`, without their positions."""
    node, _ = _maker(name, producers)
    return node is not None and node.op_type in _BEST and _root(node.input[0], producers) == root


def _floats_before(start: str, producers: Producers, kinds: Mapping[str, int]) -> Iterator[str]:
    """Yield floating values from which `start` is computed, including itself, nearest first."""
    waiting, seen = [start], {start}
    while waiting:
        name = waiting.pop(0)
        node = producers.get(name)
        if kinds.get(name) in FLOATING and node is not None:
            yield name
        for before in node.input if node is not None else ():
            if before and before not in seen and before in producers:
                seen.add(before)
                waiting.append(before)


def _classes(model: ModelProto, node: NodeProto) -> int:
    """Return the size of the axis along which an ArgMax or TopK searches; 0 if it is not fixed."""
    default = -1 if node.op_type == "TopK" else 0
    axis = next((int(attribute.i) for attribute in node.attribute if attribute.name == "axis"), default)
    for value in _inferred(model):
        dims = value.type.tensor_type.shape.dim
        if value.name == node.input[0] and -len(dims) <= axis < len(dims):
            return max(int(dims[axis].dim_value), 0)
    return 0


def _inferred(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the types of the graph's values by ONNX's shape inference, without copying large weights."""
    bare = _without_weights(model)
    try:
        bare = onnx.shape_inference.infer_shapes(bare)
    except Exception as error:  # native code, whose errors have no common base
        logger.info("shape inference failed: %s", error)
    return [*bare.graph.input, *bare.graph.value_info, *bare.graph.output]


def _without_weights(model: ModelProto) -> ModelProto:
    """Return the model with only the types of weights that cannot hold shapes."""
    bare = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = bare.graph
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    graph.name = model.graph.name
    for tensor in model.graph.initializer:
        if tensor.ByteSize() <= SHAPE_BYTES:
            graph.initializer.append(tensor)
        elif tensor.name not in {value.name for value in graph.input}:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return bare


def _elem(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)
