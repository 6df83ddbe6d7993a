"""A data file beside an ONNX model: weights are appended one by one and read back memory-mapped.

    with DataFile(folder / "model.onnx.data") as data:
        gp.split(model, factors, store=data.append)      each factor leaves memory once it is written
        data.store_initializers_(model)                  the weights that stay dense follow
    ir.save(model, folder / "model.onnx")                the model refers to the data, which are not written again

Offsets are aligned to 64 bytes, or to a page for large tensors, so that a runtime can map them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from graph_passes.constants import lazily
from rsi_deploy.core.types import Array

ALIGNMENT, PAGE, LARGE = 64, 65536, 1 << 20
SMALL = 1024  # bytes; smaller tensors stay in the model file, where shape inference needs them
CHUNK = 1 << 25  # bytes copied at a time


class DataFile:
    """A growing data file whose `ir.ExternalTensor`s use no memory until they are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, array: Array, name: str) -> ir.TensorProtocol:
        """Write `array` in C order and return a tensor that refers to it; small arrays stay in memory."""
        tensor = ir.tensor(array, name=name)
        return tensor if tensor.nbytes < SMALL else self._written(tensor, array)

    def replace(self, tensor: ir.TensorProtocol, array: Callable[[], Array]) -> ir.TensorProtocol:
        """Return a tensor with the numbers of `array`, of the same shape and dtype; overwrite `tensor` in this file."""
        if not isinstance(tensor, ir.ExternalTensor) or not self._holds(tensor):
            return lazily(tensor, array)
        new = ir.Tensor(np.ascontiguousarray(array()), dtype=tensor.dtype)
        self._write(new, new.numpy(), tensor.offset or 0)
        tensor.release()  # the old numbers are mapped
        return tensor

    def store_initializers_(self, model: ir.Model) -> None:
        """Move every initializer into this file (small ones into the model), so that no other file is needed."""
        for graph in model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or self._holds(tensor) or tensor.dtype == ir.DataType.STRING:
                    continue
                if tensor.nbytes >= SMALL:
                    value.const_value = self._written(tensor, tensor.numpy())
                elif isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.release()

    def _holds(self, tensor: ir.TensorProtocol) -> bool:
        return isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) == self.path

    def _written(self, tensor: ir.TensorProtocol, array: Array) -> ir.ExternalTensor:
        unit = PAGE if tensor.nbytes >= LARGE else ALIGNMENT
        offset = -(-self._file.seek(0, os.SEEK_END) // unit) * unit
        self._write(tensor, array, offset)
        return ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=ir.Shape(list(array.shape)),
            name=tensor.name or "",
            base_dir=os.fspath(self.path.parent),
        )

    def _write(self, tensor: ir.TensorProtocol, array: Array, offset: int) -> None:
        """Write the array, or the packed bytes of the tensor."""
        self._file.seek(offset)
        if tensor.dtype.bitwidth < 8:
            self._file.write(tensor.tobytes())  # packed
        else:
            rows = array.reshape(-1) if array.flags.c_contiguous else array
            step = max(1, CHUNK // max(rows[:1].nbytes, 1)) if rows.ndim else 1
            for start in range(0, len(rows), step) if rows.ndim else ():
                self._file.write(np.ascontiguousarray(rows[start : start + step]).view(np.uint8).data)
            if not rows.ndim:
                self._file.write(array.tobytes())
        self._file.flush()
