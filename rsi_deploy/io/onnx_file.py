"""Read, write, measure and hash ONNX files.

Every file is read through the checks of `rsi_deploy.io.onnx_reader`.
"""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, TensorProto

from graph_passes.cleanup import remove_unused
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import first_line
from rsi_deploy.io.manifest import file_hash
from rsi_deploy.io.onnx_checks.parts import all_tensors
from rsi_deploy.io.onnx_maps import restore_map_types_in_file
from rsi_deploy.io.onnx_reader import load_model, read_proto

# More bytes of weights than this go to model.onnx.data: protobuf is limited to 2 GiB, and copies need memory.
INLINE_LIMIT = 1 << 30


def read_onnx(path: Path, *, assume_constant: bool = False) -> ir.Model:
    """Read an ONNX file; large weights stay on disk and are memory-mapped when they are used.

    Every node gets a unique name (see `name_nodes_`), which reports and profiles refer to.

    Args:
        path: ONNX file.
        assume_constant: treat initializers that are also graph inputs as constants and remove these inputs. Before IR
            version 4 every initializer had to be an input; such inputs stay.

    Raises:
        ModelError: The file is not ONNX, or a check of `rsi_deploy.io.onnx_reader` fails.
    """
    model = load_model(path)
    name_nodes_(model)
    if assume_constant and model.ir_version >= 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
    return model


def name_nodes_(model: ir.Model) -> None:
    """Give every node a unique name in the model, including nodes in functions and subgraphs.

    An unnamed node is named after its first output. Where names repeat, the first node keeps the name.
    """
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        base = name = node.name or next((value.name for value in node.outputs if value.name), node.op_type)
        number = 0
        while name in seen or (name != node.name and name in taken):
            number += 1
            name = f"{base}_{number}"
        seen.add(name)
        node.name = name


def write_onnx(model: ir.Model, path: Path) -> None:
    """Write the model as one file, or with `NAME.data` beside it above `INLINE_LIMIT` bytes of weights."""
    if weight_bytes(model) > INLINE_LIMIT:
        write_external(model, path)
        return
    ir.external_data.load_to_model(model)  # else weights would stay in the file they were read from
    save_model(model, path)


def write_external(model: ir.Model, path: Path) -> None:
    """Write the model with all its weights in `NAME.data` beside it, one at a time, so that they can be mapped."""
    save_model(model, path, f"{path.name}.data")


def save_model(model: ir.Model, path: Path, external_data: str | None = None) -> None:
    """Write the model as it is, or with its weights in a file named `external_data` beside it.

    Raises:
        ModelError: ONNX cannot store something that the model was read with, such as a device without a name.
    """
    try:
        with _untyped_initializers(model):
            ir.save(model, path, external_data=external_data)
        restore_map_types_in_file(path, model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the model cannot be written: {first_line(cause)}", hint="export it again") from error


@contextlib.contextmanager
def _untyped_initializers(model: ir.Model) -> Iterator[None]:
    """Write initializers without entries in value_info, which would repeat their types and shapes."""
    values = [v for graph in model.graphs() for v in graph.initializers.values() if not v.is_graph_input()]
    known = [(value, value.type, value.shape) for value in values if not value.is_graph_output()]
    try:
        for value, _, _ in known:
            value.type = value.shape = None
        yield
    finally:
        for value, kind, shape in known:
            value.type, value.shape = kind, shape


def copy_model(path: Path, target: Path) -> None:
    """Copy a model to another name. A model with a data file is written again: it refers to that file by name."""
    if path.with_name(f"{path.name}.data").exists():
        write_external(read_onnx(path), target)
    else:
        shutil.copyfile(path, target)


def move_model(path: Path, target: Path) -> None:
    """Move a model to another name, as `copy_model` copies it."""
    data = path.with_name(f"{path.name}.data")
    if data.exists():
        copy_model(path, target)
        path.unlink()
        data.unlink()
    else:
        path.replace(target)


def release_weights_(model: ir.Model) -> None:
    """Drop the weights now; otherwise reference cycles and the exporter's caches keep them in memory."""
    for value in model.graph.initializers.values():
        value.const_value = None


def file_bytes(path: Path) -> int:
    """Return the bytes of a model file and its data file."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def refuse_growth(compressed: int, dense: int, name: str) -> None:
    """Refuse a compressed model that is larger than the dense one.

    Args:
        compressed: bytes of the compressed model.
        dense: bytes of the dense model as the user supplied it.
        name: name of the dense model.

    Raises:
        ModelError: The compressed model is larger.
    """
    if compressed > dense:
        raise ModelError(
            f"{name} has {dense:,} bytes, but the compressed model has {compressed:,}, so it is not delivered",
            hint="type a smaller rank or budget, split other sites (--include, --exclude), or add --allow-larger to "
            "keep it",
        )


def bytes_with_external_files(path: Path) -> int:
    """Return the bytes of a model file and of all files that hold its external weights.

    Raises:
        ModelError: The file is not ONNX.
    """
    return sum(file.stat().st_size for file in (path, *external_files(path)))


def bytes_in_one_file(path: Path, proto: ModelProto | None = None) -> int:
    """Return the bytes that a model would have with its external weights inside; the weights are not read.

    Args:
        path: file of the model.
        proto: the same model, parsed; None reads it from its file.

    Raises:
        ModelError: The file is not ONNX.
    """
    if proto is None:
        proto = read_proto(path)
    else:
        parsed, proto = proto, ModelProto()
        proto.CopyFrom(parsed)
    weights = 0
    for tensor in all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            size = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            weights += size + 2 * _varint_bytes(size)  # lengths of field and tensor, and one byte for each tag
    return int(proto.ByteSize()) + weights


def _varint_bytes(number: int) -> int:
    """Return the bytes of a protobuf length, which stores seven bits per byte."""
    return max(1, -(-number.bit_length() // 7))


def external_files(path: Path) -> list[Path]:
    """List the existing files that hold a model's external weights, by name.

    Raises:
        ModelError: The file is not ONNX.
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
    """Return the sha256 of an ONNX file in hexadecimal; with external data, of the hashes of all its files."""
    hashes = [file_hash(file) for file in (path, *external_files(path))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def weights_hash(model: ir.Model) -> str:
    """Return the sha256 of the names, types, shapes and bytes of all initializers, in the order of their names."""
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
                tensor.release()  # unmap, or the pages would count as memory of this process
    return digest.hexdigest()


def remove_unused_(model: ir.Model) -> str:
    """Remove unused initializers; return a note that names them, or "".

    From IR version 4 on, an initializer that is also a graph input stays, as callers may feed it.
    """
    unused = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if not (value.uses() or value.is_graph_output() or (value.is_graph_input() and model.ir_version >= 4))
    ]
    if not unused:
        return ""
    size = sum(value.const_value.nbytes for value in unused if value.const_value is not None)
    names = [value.name or "" for value in unused]
    for value in unused:
        remove_unused(value, overridable=True)
    more = f" and {len(names) - 3} more" * (len(names) > 3)
    return f"unused initializers were removed: {', '.join(names[:3])}{more}, {size:,} bytes"


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers of the model's graphs."""
    return sum(tensor.nbytes for tensor in _initializers(model))


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
