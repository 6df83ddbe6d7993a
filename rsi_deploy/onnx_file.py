"""ONNX files: read for surgery, written as one file or with data beside it, measured and told apart by their content.

What a file claims is not believed: it comes in through `rsi_deploy.gateway.onnx_reader`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from rsi_deploy.errors import ModelError
from rsi_deploy.gateway.limits import first_line
from rsi_deploy.gateway.onnx_maps import put_map_types_into
from rsi_deploy.gateway.onnx_parts import all_tensors
from rsi_deploy.gateway.onnx_reader import load_model, read_proto
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
    model = load_model(path)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.name = node.name or next((value.name for value in node.outputs if value.name), node.name)
    if assume_constant and model.ir_version >= 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
    return model


def write_onnx(model: ir.Model, path: Path) -> None:
    """Write the model as one file, or with `NAME.data` beside it above `INLINE_LIMIT` bytes of weights."""
    if weight_bytes(model) > INLINE_LIMIT:
        write_external(model, path)
        return
    ir.external_data.load_to_model(model)  # else a weight read from another file would go on living there
    save_model(model, path)


def write_external(model: ir.Model, path: Path) -> None:
    """Write the model with all its weights in `NAME.data` beside it, one at a time, so that others can map them."""
    save_model(model, path, f"{path.name}.data")


def save_model(model: ir.Model, path: Path, external_data: str | None = None) -> None:
    """Write the model as it is, or with its weights in a file of that name beside it.

    Raises:
        ModelError: it was read with something that ONNX cannot hold, such as a device without a name.
    """
    try:
        ir.save(model, path, external_data=external_data)
        put_map_types_into(path, model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the model cannot be written again: {first_line(cause)}; export it anew") from error


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
    names = {
        entry.value
        for tensor in all_tensors(read_proto(path))
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
