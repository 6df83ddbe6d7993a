"""Check that each tensor has as much data as its dims declare, in an allowed place, before any tensor is loaded.

dims [8, 8], FLOAT   256 bytes of raw_data, or 64 entries of float_data, or 256 bytes of a file beside the model
sparse               as many indices as values, and a limited size when it is made dense
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx import ModelProto, SparseTensorProto, TensorProto, TypeProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import GENERATED_NUMBERS, GENERATED_RATIO, RANK, quoted_name
from rsi_deploy.io.onnx_checks.parts import all_graphs, all_sparse, all_tensors

FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_tensors(model: ModelProto, path: Path) -> None:
    """Check every tensor's data against its dims and type.

    Raises:
        ModelError: A tensor is inconsistent; the message names it, what it declares and what is stored.
    """
    for tensor in all_tensors(model):
        _check_tensor(tensor, path)
    for sparse in all_sparse(model):
        _check_sparse(sparse, path)
    for graph in all_graphs(model):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_type(value.type, f"{path.name}: value {quoted_name(value.name)}")


def _check_type(declared: TypeProto, where: str) -> None:
    """Check that the types of all elements are known; 0 stands for an undeclared type."""
    kind = declared.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        element = getattr(declared, kind).elem_type
        if element not in TensorProto.DataType.values():
            raise ModelError(
                f"{where} has the type {element}, which onnx {onnx.__version__} does not know", hint="upgrade onnx"
            )
    elif kind in ("sequence_type", "optional_type"):
        _check_type(getattr(declared, kind).elem_type, where)
    elif kind == "map_type":
        _check_type(declared.map_type.value_type, where)


def _check_tensor(tensor: TensorProto, path: Path) -> None:
    where = f"{path.name}: tensor {quoted_name(tensor.name)}"
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{where} has a negative dimension: {_listed(tensor.dims)}", hint="export the model again")
    if len(tensor.dims) > RANK:
        raise ModelError(f"{where} has {len(tensor.dims)} dimensions", hint=f"the limit is {RANK}")
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelError(
            f"{where} has the type {tensor.data_type}, which onnx {onnx.__version__} does not know: "
            "export the model again, or pip install -U onnx"
        )
    if tensor.HasField("segment"):
        raise ModelError(
            f"{where} is a segment of a larger tensor, which is not supported", hint="export the model again"
        )
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        _check_count(where, tensor, count, len(tensor.string_data), "strings")
        if tensor.data_location == TensorProto.EXTERNAL or tensor.HasField("raw_data"):
            raise ModelError(f"{where} has strings outside string_data", hint="export the model again")
        return
    bits = ir.DataType(tensor.data_type).bitwidth
    needed = -(-count * bits // 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, needed, path.parent, where)
    elif tensor.HasField("raw_data"):
        _check_count(where, tensor, needed, len(tensor.raw_data), "bytes")
        if any(len(getattr(tensor, field)) for field in FIELDS):
            raise ModelError(f"{where} holds its data twice", hint="export the model again")
    else:
        _check_fields(where, tensor, count, bits)


def _check_fields(where: str, tensor: TensorProto, count: int, bits: int) -> None:
    """Check that the field for the tensor's type has as many entries as the dims declare."""
    own = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    if foreign := [field for field in FIELDS if field != own and len(getattr(tensor, field))]:
        raise ModelError(
            f"{where} holds its data in {foreign[0]}, but its type takes {own}", hint="export the model again"
        )
    each = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    needed = -(-count * bits // 8) if bits in (2, 4) else count * each  # 6-bit types use one entry per number
    _check_count(where, tensor, needed, len(getattr(tensor, own)), "numbers")


def _check_count(where: str, tensor: TensorProto, needed: int, stored: int, unit: str) -> None:
    if needed != stored:
        raise ModelError(
            f"{where} has dims {_listed(tensor.dims)} ({needed} {unit}), but {stored} {unit}",
            hint="copy or export the model again",
        )


def _check_external(tensor: TensorProto, needed: int, folder: Path, where: str) -> None:
    """Check that external data are a large enough regular file inside the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise ModelError(f"{where}: the location of its data repeats a key", hint="export the model again")
    location = entries.get("location", "")
    outside = not location or os.path.isabs(location) or ".." in Path(location).parts or "\\" in location
    try:
        file = folder / location
        outside = outside or not file.resolve().is_relative_to(folder.resolve())
        if outside:
            raise ModelError(
                f"{where}: its data are outside the model's folder ({quoted_name(location)}), which is refused",
                hint="move them into the folder and refer to them by a relative path",
            )
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ModelError(
                f"{where}: its data file {quoted_name(location)} is a link or no regular file, which is refused",
                hint="copy the file itself beside the model",
            )
        if not file.is_file():
            raise ModelError(
                f"{where}: its data file {quoted_name(location)} is missing", hint="put it beside the model"
            )
        size = file.stat().st_size
    except (OSError, ValueError) as error:  # invalid names, or links that form a cycle
        raise ModelError(
            f"{where}: its data file {quoted_name(location)} cannot be accessed: {error}",
            hint="copy it beside the model",
        ) from error
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        raise ModelError(
            f"{where}: offset or length of its data is not a number", hint="export the model again"
        ) from None
    if length != needed or offset < 0:
        raise ModelError(
            f"{where} has dims {_listed(tensor.dims)} ({needed} bytes), but refers to {length} bytes",
            hint="export it again",
        )
    if size < offset + length:
        raise ModelError(
            f"{where}: its data file {quoted_name(location)} is too short: it has {size} of {offset + length} bytes",
            hint="copy it again",
        )


def _check_sparse(sparse: SparseTensorProto, path: Path) -> None:
    """Check that a sparse tensor has one index or coordinate for every value and a limited dense size."""
    where = f"{path.name}: sparse tensor {quoted_name(sparse.values.name)}"
    values = math.prod(sparse.values.dims)
    if tuple(sparse.indices.dims) not in ((values,), (values, len(sparse.dims))):
        raise ModelError(
            f"{where} has {values} values, but indices of shape {_listed(sparse.indices.dims)}", hint="export it again"
        )
    if any(dim <= 0 for dim in sparse.dims):
        raise ModelError(f"{where} has a dimension below 1: {_listed(sparse.dims)}", hint="export the model again")
    if (dense := math.prod(sparse.dims)) > max(GENERATED_NUMBERS, GENERATED_RATIO * values):
        raise ModelError(
            f"{where} has dims {_listed(sparse.dims)}, {dense} numbers for {values} values, which is refused",
            hint="store it dense",
        )


def _listed(dims: Iterable[int]) -> str:
    sizes = list(dims)
    return str(sizes) if len(sizes) <= 8 else f"{str(sizes[:8])[:-1]}, ...]"
