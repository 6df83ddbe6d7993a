"""Preserve map types of a graph's inputs and outputs, which onnx_ir cannot represent.

    seq(map(int64, tensor(float)))   output of ZipMap, the last node of most scikit-learn classifiers
    map(string, tensor(float))       input of DictVectorizer

They are removed before onnx_ir reads a model and restored in the written file. onnxruntime infers a missing type, but
onnx's checker requires the types of a graph's outputs.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto, TypeProto, ValueInfoProto

from rsi_deploy.io.onnx_checks.parts import all_graphs

_KEY = "rsi_deploy.map_types"


def has_map(declared: TypeProto) -> bool:
    """Return whether a type is a map, or a sequence or optional of maps."""
    kind = declared.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return has_map(getattr(declared, kind).elem_type)
    return bool(kind == "map_type")


def remove_map_types_(proto: ModelProto) -> dict[str, TypeProto]:
    """Remove the map types of all values; return those of inputs and outputs by name."""
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


def store_map_types_(model: ir.Model, types: Mapping[str, TypeProto]) -> None:
    """Store the types in the model's metadata for `restore_map_types_`."""
    if types:
        model.meta[_KEY] = dict(types)


def map_types(model: ir.Model) -> Mapping[str, TypeProto]:
    """Return the types that were removed from the model's inputs and outputs."""
    found: Mapping[str, TypeProto] = model.meta.get(_KEY, {})
    return found


def restore_map_types_(proto: ModelProto, model: ir.Model) -> None:
    """Restore the map types of `model` in a proto that was made from it."""
    types = map_types(model)
    for graph in all_graphs(proto):
        for value in (*graph.input, *graph.output):
            if value.name in types and value.type.WhichOneof("value") is None:
                value.type.CopyFrom(types[value.name])


def restore_map_types_in_file(path: Path, model: ir.Model) -> None:
    """Restore the map types of `model` in a file that was written from it."""
    if map_types(model):
        proto = ModelProto.FromString(path.read_bytes())
        restore_map_types_(proto, model)
        path.write_bytes(proto.SerializeToString())


def _drop_maps_(values: Iterable[ValueInfoProto]) -> None:
    for value in [value for value in values if has_map(value.type)]:
        value.ClearField("type")
