r"""The only reader of ONNX files: it checks that a file is consistent before anything uses it.

    file --> protobuf --> tensors     size of data as declared, inside the model's folder
                     \--> names       defined once and before use; limited nesting
                     \--> nodes       attributes and inputs as the operators define them
                     \--> growth      no small graph that generates huge values
         --> ModelProto | ir.Model | a runtime

The path, inode, size and time of a checked file are remembered; it is not checked again until they change.
"""

import math
import os
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model, load_external_data_for_tensor

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import MODEL_BYTES, first_line, quoted_name
from rsi_deploy.io.onnx_checks.growth import check_growth
from rsi_deploy.io.onnx_checks.names import check_names
from rsi_deploy.io.onnx_checks.nodes import check_nodes
from rsi_deploy.io.onnx_checks.parts import all_tensors, texts
from rsi_deploy.io.onnx_checks.tensors import check_tensors
from rsi_deploy.io.onnx_maps import remove_map_types_, store_map_types_

SMALL = 4096
"""Most numbers in an external tensor that `read_graph` loads."""
_MOST_CHECKED = 1024
_checked: set[tuple[str, int, int, int]] = set()


def read_proto(path: str | Path, *, with_data: bool = False) -> ModelProto:
    """Read and check the model in a file.

    Args:
        path: ONNX file in protobuf's binary form; its name does not matter.
        with_data: whether to load external data into the model.

    Raises:
        ModelError: The file is not a regular file or not ONNX, or a check fails; the message says where.
    """
    path = Path(path)
    stamp = _stamp(path)
    try:
        proto: ModelProto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="name an .onnx file") from error
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path.name} is not an ONNX file, is cut off, or nests too deeply: {first_line(error)}",
            hint="copy or export it again",
        ) from error
    if stamp not in _checked:
        check_proto(proto, path)
        _remember(stamp)
    if with_data:
        load_external_data_for_model(proto, os.fspath(path.parent))
    return proto


def read_graph(path: str | Path) -> ModelProto:
    """Read and check the model in a file, and load its small external tensors, such as shapes, axes and indices.

    Raises:
        ModelError: As for `read_proto`.
    """
    return with_small_data(read_proto(path), Path(path).parent)


def with_small_data(proto: ModelProto, folder: Path) -> ModelProto:
    """Read the small external tensors of `proto`, which lie in `folder`, into it, and return it."""
    for tensor in all_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL:
            load_external_data_for_tensor(tensor, os.fspath(folder))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return proto


def load_model(path: str | Path) -> ir.Model:
    """Read and check the model in a file as `ir.Model`; external weights stay on disk, memory-mapped when used.

    Raises:
        ModelError: As for `read_proto`, or the model has sparse initializers, which cannot be rewritten.
    """
    return graph_of(read_proto(path), Path(path))


def graph_of(proto: ModelProto, path: Path) -> ir.Model:
    """Return a new graph of a model that `read_proto` has read from `path`; `proto` may lose its map types.

    Raises:
        ModelError: sparse initializers, which a graph cannot be changed with.
    """
    if proto.graph.sparse_initializer:
        raise ModelError(f"{path.name} has sparse initializers, which cannot be compressed", hint="store them dense")
    map_types = remove_map_types_(proto)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds on a graph it cannot hold
        raise ModelError(f"{path.name} cannot be read: {first_line(error)}", hint="copy or export it again") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    store_map_types_(model, map_types)
    return model


def check_file(path: str | Path) -> None:
    """Check a file that a runtime is going to read, unless it was checked before.

    Raises:
        ModelError: As for `read_proto`.
    """
    if _stamp(Path(path)) not in _checked:
        read_proto(path)


def check_proto(proto: ModelProto, path: Path) -> None:
    """Run all checks; each relies on those before it.

    Args:
        proto: parsed model.
        path: its file, for external data and messages.

    Raises:
        ModelError: As for `read_proto`.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path.name} is not an ONNX file: it has no graph or no opset", hint="name an .onnx file")
    if strange := next((text for text in texts(proto) if isinstance(text, bytes)), None):
        raise ModelError(
            f"{path.name}: the name {quoted_name(strange.decode('latin-1'))} is not UTF-8",
            hint="export the model again",
        )
    check_tensors(proto, path)
    check_names(proto, path.name)
    check_nodes(proto, path.name)
    check_growth(proto, path.name)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """Return what identifies a checked file: path, inode, size and modification time."""
    if not path.is_file():
        raise ModelError(
            f"{path}: {('no regular file' if path.exists() else 'no such file')}", hint="expected an ONNX model"
        )
    found = path.stat()
    if found.st_size > MODEL_BYTES:
        raise ModelError(
            f"{path.name} has {found.st_size} bytes, more than one ONNX file can hold",
            hint="store its weights in a data file beside it: onnx.save(model, path, save_as_external_data=True)",
        )
    return os.fspath(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns


def _remember(stamp: tuple[str, int, int, int]) -> None:
    if len(_checked) >= _MOST_CHECKED:
        _checked.clear()
    _checked.add(stamp)
