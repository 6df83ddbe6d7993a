"""Whether the tensors of a model are as large as they say, and lie where they may, before any of them is made.

dims [8, 8], FLOAT   256 bytes of raw_data, or 64 entries of float_data, or 256 bytes of a file beside the model
sparse               as many indices as values, and no denser than it may be once it is written out
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto, SparseTensorProto, TensorProto, TypeProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import MADE_NUMBERS, MADE_RATIO, RANK, shown
from rsi_deploy.io.onnx_checks.parts import all_graphs, all_sparse, all_tensors

FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_tensors(model: ModelProto, path: Path) -> None:
    """Hold every tensor's data against its dims and type.

    Raises:
        ModelError: names the tensor, what it claims and what is there.
    """
    for tensor in all_tensors(model):
        _check_tensor(tensor, path)
    for sparse in all_sparse(model):
        _check_sparse(sparse, path)
    for graph in all_graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_type(value.type, f"{path.name}: value {shown(value.name)}")


def _check_type(declared: TypeProto, where: str) -> None:
    """Types of elements are known; 0 says that nobody told."""
    kind = declared.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        element = getattr(declared, kind).elem_type
        if element not in TensorProto.DataType.values():
            raise ModelError(
                f"{where} has the type {element}, which onnx {onnx.__version__} does not know; upgrade onnx"
            )
    elif kind in ("sequence_type", "optional_type"):
        _check_type(getattr(declared, kind).elem_type, where)
    elif kind == "map_type":
        _check_type(declared.map_type.value_type, where)


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    where = f"{path.name}: tensor {shown(tensor.name)}"
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{where} has a negative dimension: {_listed(tensor.dims)}; export the model again")
    if len(tensor.dims) > RANK:
        raise ModelError(f"{where} has {len(tensor.dims)} dimensions; up to {RANK} can be read")
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelError(
            f"{where} has the type {tensor.data_type}, which onnx {onnx.__version__} does not know: "
            "export the model again, or pip install -U onnx"
        )
    if tensor.HasField("segment"):
        raise ModelError(f"{where} is a segment of a larger one, which is not read; export the model again")
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        _check_count(where, tensor, count, len(tensor.string_data), "strings")
        if tensor.data_location == TensorProto.EXTERNAL or tensor.HasField("raw_data"):
            raise ModelError(f"{where} holds strings, which can lie in string_data alone; export the model again")
        return
    bits = ir.DataType(tensor.data_type).bitwidth
    needed = -(-count * bits // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, needed, path.parent, where)
    elif tensor.HasField("raw_data"):
        _check_count(where, tensor, needed, len(tensor.raw_data), "bytes")
        if any(len(getattr(tensor, field)) for field in FIELDS):
            raise ModelError(f"{where} holds its data twice; export the model again")
    else:
        _check_fields(where, tensor, count, bits)


def _check_fields(where: str, tensor: TensorProto, count: int, bits: int) -> None:
    """As many entries as the dims say, in the one field that the type takes."""
    own = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if foreign := [field for field in FIELDS if field != own and len(getattr(tensor, field))]:
        raise ModelError(f"{where} holds its data in {foreign[0]}, but its type takes {own}; export the model again")
    each = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    needed = -(-count * bits // 8) if bits in (2, 4) else count * each  # those of 6 bits have an entry each
    _check_count(where, tensor, needed, len(getattr(tensor, own)), "numbers")


def _check_count(where: str, tensor: TensorProto, needed: int, there: int, unit: str) -> None:
    if needed != there:
        raise ModelError(
            f"{where} has dims {_listed(tensor.dims)} ({needed} {unit}), but {there} {unit}; copy or export it again"
        )


def _check_external(tensor: TensorProto, needed: int, folder: Path, where: str) -> None:
    """Its data lie in a regular file inside the model's folder, as many as are needed."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise ModelError(f"{where}: where its data lie is said twice; export the model again")
    location = entries.get("location", "")
    outside = not location or os.path.isabs(location) or ".." in Path(location).parts or "\\" in location
    try:
        file = folder / location
        outside = outside or not file.resolve().is_relative_to(folder.resolve())
        if outside:
            raise ModelError(
                f"{where}: its data lie outside the model's folder ({shown(location)}), which is refused; "
                "put them beside the model and name them by a path within its folder"
            )
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ModelError(
                f"{where}: its data file {shown(location)} is a link or no regular file, which is refused; "
                "copy the file itself beside the model"
            )
        if not file.is_file():
            raise ModelError(f"{where}: its data file {shown(location)} is missing; put it beside the model")
        size = file.stat().st_size
    except (OSError, ValueError) as error:  # names that no file can have; links in a ring
        raise ModelError(
            f"{where}: its data file {shown(location)} cannot be looked at: {error}; copy it beside the model"
        ) from error
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        raise ModelError(f"{where}: offset or length of its data is no number; export the model again") from None
    if length != needed or offset < 0:
        raise ModelError(
            f"{where} has dims {_listed(tensor.dims)} ({needed} bytes), but refers to {length} bytes; export it again"
        )
    if size < offset + length:
        raise ModelError(
            f"{where}: its data file {shown(location)} is too short: {size} bytes of {offset + length}; copy it again"
        )


def _check_sparse(sparse: SparseTensorProto, path: Path) -> None:
    """One index, or one coordinate of each dimension, for every value; and not much larger when it is written out."""
    where = f"{path.name}: sparse tensor {shown(sparse.values.name)}"
    values = math.prod(sparse.values.dims)
    if tuple(sparse.indices.dims) not in ((values,), (values, len(sparse.dims))):
        raise ModelError(
            f"{where} has {values} values, but indices of the shape {_listed(sparse.indices.dims)}; export it again"
        )
    if any(dim <= 0 for dim in sparse.dims):
        raise ModelError(f"{where} has a dimension below 1: {_listed(sparse.dims)}; export the model again")
    if (dense := math.prod(sparse.dims)) > max(MADE_NUMBERS, MADE_RATIO * values):
        raise ModelError(
            f"{where} is {_listed(sparse.dims)} when it is written out: {dense} numbers of {values} values, which is "
            "refused; store it dense"
        )


def _listed(dims: Iterable[int]) -> str:
    sizes = list(dims)
    return str(sizes) if len(sizes) <= 8 else f"{str(sizes[:8])[:-1]}, ...]"
