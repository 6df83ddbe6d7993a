"""Map types of a graph's values, which onnx_ir cannot hold: taken off before it reads a model, put back into the file.

    seq(map(int64, tensor(float)))   what ZipMap gives, the last node of most scikit-learn classifiers
    map(string, tensor(float))       what DictVectorizer takes

A value without a type is valid for onnxruntime, which infers it; onnx's checker wants the type of a graph's outputs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto, TypeProto, ValueInfoProto

from rsi_deploy.io.onnx_checks.parts import all_graphs

_KEY = "rsi_deploy.map_types"


def has_map(declared: TypeProto) -> bool:
    """Whether a type is a map, or a sequence or an optional of maps."""
    kind = declared.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return has_map(getattr(declared, kind).elem_type)
    return bool(kind == "map_type")


def take_map_types_(proto: ModelProto) -> dict[str, TypeProto]:
    """Take the map types off all values; those of inputs and outputs by the value's name."""
    taken: dict[str, TypeProto] = {}
    for graph in all_graphs(proto):
        for value in (*graph.input, *graph.output):
            if has_map(value.type):
                taken[value.name] = TypeProto.FromString(value.type.SerializeToString())
                value.ClearField("type")
        _drop_maps_(graph.value_info)
    for function in proto.functions:
        _drop_maps_(function.value_info)
    return taken


def keep_map_types_(model: ir.Model, types: Mapping[str, TypeProto]) -> None:
    """Keep the types beside the model, for `put_map_types_back_`."""
    if types:
        model.meta[_KEY] = dict(types)


def map_types(model: ir.Model) -> Mapping[str, TypeProto]:
    """The types that were taken off the model's inputs and outputs."""
    found: Mapping[str, TypeProto] = model.meta.get(_KEY, {})
    return found


def put_map_types_back_(proto: ModelProto, model: ir.Model) -> None:
    """Declare the map types of `model` in what it was made into."""
    types = map_types(model)
    for graph in all_graphs(proto):
        for value in (*graph.input, *graph.output):
            if value.name in types and value.type.WhichOneof("value") is None:
                value.type.CopyFrom(types[value.name])


def put_map_types_into(path: Path, model: ir.Model) -> None:
    """Declare the map types of `model` in the file that it was written to."""
    if map_types(model):
        proto = ModelProto.FromString(path.read_bytes())
        put_map_types_back_(proto, model)
        path.write_bytes(proto.SerializeToString())


def _drop_maps_(values: Iterable[ValueInfoProto]) -> None:
    for value in [value for value in values if has_map(value.type)]:
        value.ClearField("type")
