"""ONNX files: read for surgery, written as one file or with data beside it, measured and told apart by their content.

What a file claims is not believed: it comes in through `rsi_deploy.io.onnx_reader`.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from graph_passes.cleanup import remove_unused
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import first_line
from rsi_deploy.io.manifest import file_hash
from rsi_deploy.io.onnx_checks.parts import all_tensors
from rsi_deploy.io.onnx_maps import put_map_types_into
from rsi_deploy.io.onnx_reader import load_model, read_proto

# Above this many bytes of weights they go to model.onnx.data: a protobuf cannot pass 2 GiB, and copies cost memory.
INLINE_LIMIT = 1 << 30


def read_onnx(path: Path, *, assume_constant: bool = False) -> ir.Model:
    """Read an ONNX file; large weights stay on disk, memory-mapped when they are used.

    Every node gets a name of its own (see `name_nodes_`), so that reports and profiles can speak of it.

    Args:
        path: the file.
        assume_constant: take initializers that are graph inputs too, which a caller could override, for constants:
            they are no inputs any more. (Before IR version 4 every initializer had to be an input; those stay.)

    Raises:
        ModelError: not an ONNX file; external data missing, too short, or outside the model's folder; dims that do
            not match the data; names that dangle, repeat or form a cycle.
    """
    model = load_model(path)
    name_nodes_(model)
    if assume_constant and model.ir_version >= 4:
        for value in [value for value in model.graph.inputs if value.is_initializer()]:
            model.graph.inputs.remove(value)
    return model


def name_nodes_(model: ir.Model) -> None:
    """Give every node a name that no other node of the model has, in functions and bodies too.

    A node without a name is called after its first output; of several with one name the first one keeps it.
    """
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        wanted = name = node.name or next((value.name for value in node.outputs if value.name), node.op_type)
        number = 0
        while name in seen or (name != node.name and name in taken):
            number += 1
            name = f"{wanted}_{number}"
        seen.add(name)
        node.name = name


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
        with _untyped_initializers(model):
            ir.save(model, path, external_data=external_data)
        put_map_types_into(path, model)
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(f"the model cannot be written again: {first_line(cause)}; export it anew") from error


@contextlib.contextmanager
def _untyped_initializers(model: ir.Model) -> Iterator[None]:
    """Have initializers written without an entry in value_info, which would say their types and shapes twice."""
    values = [v for graph in model.graphs() for v in graph.initializers.values() if not v.is_graph_input()]
    known = [(value, value.type, value.shape) for value in values if not value.is_graph_output()]
    try:
        for value, _, _ in known:
            value.type = value.shape = None
        yield
    finally:
        for value, kind, shape in known:
            value.type, value.shape = kind, shape


def forget_weights_(model: ir.Model) -> None:
    """Let go of the weights now: a graph is full of cycles, and the exporter keeps its own alive in caches."""
    for value in model.graph.initializers.values():
        value.const_value = None


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of its data file."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def refuse_growth(made: int, dense: int, name: str) -> None:
    """Refuse a compressed model that is larger than the dense one.

    Args:
        made: bytes of the compressed model.
        dense: bytes of the dense model, as the user has it.
        name: of the dense model.

    Raises:
        ModelError: both sizes, and what to type.
    """
    if made > dense:
        raise ModelError(
            f"{name} has {dense:,} bytes, but the compressed model has {made:,}, so it is not delivered; type a "
            f"smaller rank or budget, split other sites (--include, --exclude), or add --allow-larger to have it anyway"
        )


def bytes_as_given(path: Path) -> int:
    """Bytes of a model file and of all the files beside it that hold its weights.

    Raises:
        ModelError: not an ONNX file.
    """
    return sum(file.stat().st_size for file in (path, *external_files(path)))


def bytes_in_one_file(path: Path) -> int:
    """Bytes that a model file would have with its external weights in it; none of them is read.

    Raises:
        ModelError: not an ONNX file.
    """
    proto = read_proto(path)
    weights = 0
    for tensor in all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            size = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), 0)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            weights += size + 2 * _varint_bytes(size)  # lengths of the field and of the tensor, a byte for each tag
    return int(proto.ByteSize()) + weights


def _varint_bytes(number: int) -> int:
    """Bytes of a length in protobuf: seven bits in each."""
    return max(1, -(-number.bit_length() // 7))


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


def remove_unused_(model: ir.Model) -> str:
    """Remove the initializers that nobody uses; a note that says which, or "".

    One that is a graph input too stays where a caller may feed it (from IR version 4 on).
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
    return f"unused initializers are left out: {', '.join(names[:3])}{more}, {size:,} bytes"


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the model's graphs."""
    return sum(tensor.nbytes for tensor in _initializers(model))


def _initializers(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
