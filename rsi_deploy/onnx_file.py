"""ONNX files from anywhere: read with every reference checked first, and written as one file or with data beside it.

What a file claims is not believed: external data must lie inside the model's folder and be as long as the dims say,
and names must be defined once and before their use. What is wrong is said with the tensor's or node's name.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from rsi_deploy.errors import ModelError
from rsi_deploy.manifest import file_hash

# Above this many bytes of weights they go to model.onnx.data: a protobuf cannot pass 2 GiB, and copies cost memory.
INLINE_LIMIT = 1 << 30


def read_onnx(path: Path, *, assume_constant: bool = False) -> ir.Model:
    """Read an ONNX file; large weights stay on disk, memory-mapped when they are used.

    Nodes without a name are called after their first output, so that reports and profiles can speak of them.

    Args:
        path: the file.
        assume_constant: take initializers that are graph inputs too, which a caller could override, for constants:
            they are no inputs any more. (Before IR version 4 every initializer had to be an input; those stay.)

    Raises:
        ModelError: not an ONNX file; external data missing, too short, or outside the model's folder; dims that do
            not match the data; names that dangle, repeat or form a cycle.
    """
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} is not an ONNX file, or is cut off: {_first_line(error)}") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path.name} is not an ONNX file: it holds no graph (or no opset)")
    for tensor in _tensors(proto):
        _check_data(tensor, path)
    _check_names(proto.graph, frozenset(), path.name)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds on a graph it cannot hold
        raise ModelError(f"{path.name} cannot be read: {_first_line(error)}") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.name = node.name or next((value.name for value in node.outputs if value.name), node.name)
    if assume_constant and model.ir_version >= 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
    return model


def write_onnx(model: ir.Model, path: Path) -> None:
    """Write the model as one file, or with `NAME.data` beside it above `INLINE_LIMIT` bytes of weights."""
    if weight_bytes(model) > INLINE_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data")
        return
    ir.external_data.load_to_model(model)  # else a weight read from another file would go on living there
    ir.save(model, path)


def write_external(model: ir.Model, path: Path) -> None:
    """Write the model with all its weights in `NAME.data` beside it, one at a time, so that others can map them."""
    ir.save(model, path, external_data=f"{path.name}.data")


def forget_weights_(model: ir.Model) -> None:
    """Let go of the weights now: a graph is full of cycles, and the exporter keeps its own alive in caches."""
    for value in model.graph.initializers.values():
        value.const_value = None


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of its data file."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def external_files(path: Path) -> list[Path]:
    """The files beside a model that hold its external weights, by name; one that is missing is left out.

    Raises:
        ModelError: not an ONNX file.
    """
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ModelError(f"{path}: cannot be read as ONNX: {_first_line(error)}") from error
    names = {
        entry.value
        for tensor in _tensors(proto)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / name for name in sorted(names) if (path.parent / name).is_file()]


def model_hash(path: Path) -> str:
    """sha256 of an ONNX file, in hexadecimal; with external data, of the hashes of all its files."""
    hashes = [file_hash(file) for file in (path, *external_files(path))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def weights_hash(model: ir.Model) -> str:
    """sha256 over the names, types, shapes and bytes of all initializers, in the order of their names."""
    digest = hashlib.sha256()
    for graph in model.graphs():
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None:
                continue
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            if tensor.dtype != ir.DataType.STRING and tensor.size:
                digest.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # unmap: pages that were read would count as ours
    return digest.hexdigest()


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the model's graphs."""
    return sum(tensor.nbytes for tensor in _initializers(model))


def parameters(model: ir.Model) -> int:
    """Numbers in all floating initializers of the model's graphs, and in floating Constant nodes."""
    counted = sum(tensor.size for tensor in _initializers(model) if tensor.dtype.is_floating_point())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "Constant" and (attribute := node.attributes.get("value")) is not None:
            tensor = attribute.as_tensor()
            counted += tensor.size if tensor.dtype.is_floating_point() else 0
    return counted


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value


def _check_data(tensor: TensorProto, path: Path) -> None:
    """The tensor's bytes are where and as many as its dims and type say."""
    where = f"{path.name}: tensor {tensor.name!r}"
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{where} has a negative dimension: {list(tensor.dims)}")
    if tensor.data_type == TensorProto.STRING or tensor.data_type not in TensorProto.DataType.values():
        return
    needed = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, needed, path.parent, where)
    elif tensor.HasField("raw_data") and len(tensor.raw_data) != needed:
        raise ModelError(f"{where} has dims {list(tensor.dims)} ({needed} bytes), but {len(tensor.raw_data)} bytes")


def _check_external(tensor: TensorProto, needed: int, folder: Path, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = folder / location
    outside = os.path.isabs(location) or ".." in Path(location).parts or "\\" in location
    if not location or outside or not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{where}: its data lie outside the model's folder ({location!r}), which is refused")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ModelError(f"{where}: its data file {location!r} is a link or no regular file, which is refused")
    if not file.is_file():
        raise ModelError(f"{where}: its data file {location!r} is missing; put it beside the model")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        raise ModelError(f"{where}: offset or length of its data is no number") from None
    if length != needed or offset < 0:
        raise ModelError(f"{where} has dims {list(tensor.dims)} ({needed} bytes), but refers to {length} bytes")
    if (size := file.stat().st_size) < offset + length:
        raise ModelError(f"{where}: its data file {location!r} is too short: {size} bytes of {offset + length}")


def _check_names(graph: GraphProto, outer: frozenset[str], name: str) -> None:
    """Every name is defined once, and before it is used; the scopes around a subgraph count."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    made = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        for used in filter(None, node.input):
            if used not in own and used not in outer:
                why = "a cycle, or nodes out of order" if used in made else "nothing defines it"
                raise ModelError(f"{name}: node {_called(node)} uses {used!r}: {why}")
        for subgraph in _subgraphs(node):
            _check_names(subgraph, outer | own, name)
        for output in filter(None, node.output):
            if output in own:
                raise ModelError(f"{name}: {output!r} is defined twice, the second time by node {_called(node)}")
            own.add(output)
    for output in graph.output:
        if output.name not in own and output.name not in outer:
            raise ModelError(f"{name}: the graph's output {output.name!r} is made by no node")


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of the model: initializers and attributes, in subgraphs and functions too."""
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)
    yield from _graph_tensors(model.graph)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    for subgraph in _subgraphs(node):
        yield from _graph_tensors(subgraph)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _called(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
