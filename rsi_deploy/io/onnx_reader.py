r"""The one reader of ONNX files: what a file claims is held against itself before anything is made of it.

    file --> protobuf --> tensors     as large as they say, and inside the model's folder
                     \--> names       defined once, before their use; no graph and no function without end
                     \--> nodes       with the attributes and inputs that their operators take
                     \--> growth      nothing made out of little that would fill the memory
         --> ModelProto | ir.Model | a runtime

A file that was checked is known by its inode, size and time, and not checked again while it stays as it is.
"""

import math
import os
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_model, load_external_data_for_tensor

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import MODEL_BYTES, first_line, shown
from rsi_deploy.io.onnx_checks.growth import check_growth
from rsi_deploy.io.onnx_checks.names import check_names
from rsi_deploy.io.onnx_checks.nodes import check_nodes
from rsi_deploy.io.onnx_checks.parts import all_tensors, texts
from rsi_deploy.io.onnx_checks.tensors import check_tensors
from rsi_deploy.io.onnx_maps import keep_map_types_, take_map_types_

SMALL = 4096
"""Numbers in an external tensor that is read with the graph."""
_MOST_KNOWN = 1024
_known: set[tuple[str, int, int, int]] = set()


def read_proto(path: str | Path, *, with_data: bool = False) -> ModelProto:
    """The model in a file, checked.

    Args:
        path: an ONNX file in protobuf's binary form, whatever its name.
        with_data: load external data into it, too; else they stay where they are.

    Raises:
        ModelError: no regular file, no ONNX, or one that claims what cannot be or must not be, with what and where.
    """
    path = Path(path)
    stamp = _stamp(path)
    try:
        proto: ModelProto = ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; name an .onnx file") from error
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{path.name} is not an ONNX file, is cut off, or nests too deeply: {first_line(error)}; "
            "copy or export it again"
        ) from error
    if stamp not in _known:
        check_proto(proto, path)
        _remember(stamp)
    if with_data:
        load_external_data_for_model(proto, os.fspath(path.parent))
    return proto


def read_graph(path: str | Path) -> ModelProto:
    """The model in a file, checked, with those of its external tensors that are small: shapes, axes, indices.

    Raises:
        ModelError: as for `read_proto`.
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
    """The model in a file, checked; external weights stay on disk, memory-mapped when they are used.

    Raises:
        ModelError: as for `read_proto`, or sparse initializers, which a graph cannot be changed with.
    """
    return graph_of(read_proto(path), Path(path))


def graph_of(proto: ModelProto, path: Path) -> ir.Model:
    """Return a new graph of a model that `read_proto` has read from `path`; `proto` may lose its map types.

    Raises:
        ModelError: sparse initializers, which a graph cannot be changed with.
    """
    if proto.graph.sparse_initializer:
        raise ModelError(
            f"{path.name} has sparse initializers, which only a runtime reads; store them dense to compress the model"
        )
    map_types = take_map_types_(proto)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds on a graph it cannot hold
        raise ModelError(f"{path.name} cannot be read: {first_line(error)}; copy or export it again") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    keep_map_types_(model, map_types)
    return model


def check_file(path: str | Path) -> None:
    """Check a file that somebody else is going to read: a runtime. One that is known costs a look at its stamp.

    Raises:
        ModelError: as for `read_proto`.
    """
    if _stamp(Path(path)) not in _known:
        read_proto(path)


def check_proto(proto: ModelProto, path: Path) -> None:
    """All checks, in the order in which each may believe those before it.

    Args:
        proto: as it was parsed.
        path: where it lies, for its external data and for messages.

    Raises:
        ModelError: as for `read_proto`.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path.name} is not an ONNX file: it holds no graph (or no opset); name an .onnx file")
    if strange := next((text for text in texts(proto) if isinstance(text, bytes)), None):
        raise ModelError(
            f"{path.name}: the name {shown(strange.decode('latin-1'))} is no UTF-8; export the model again"
        )
    check_tensors(proto, path)
    check_names(proto, path.name)
    check_nodes(proto, path.name)
    check_growth(proto, path.name)


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What tells that a file is the one that was checked."""
    if not path.is_file():
        raise ModelError(f"{path}: {'no regular file' if path.exists() else 'no such file'}; expected an ONNX model")
    found = path.stat()
    if found.st_size > MODEL_BYTES:
        raise ModelError(
            f"{path.name} has {found.st_size} bytes, more than one ONNX file can hold; its weights belong in a data "
            "file beside it: onnx.save(model, path, save_as_external_data=True)"
        )
    return os.fspath(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns


def _remember(stamp: tuple[str, int, int, int]) -> None:
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known.add(stamp)
