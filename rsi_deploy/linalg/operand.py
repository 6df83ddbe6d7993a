"""Products with a weight, in its own precision or, panel by panel, in bfloat16.

    forward   X = W @ Y      (out, columns)
    adjoint   Y = W^T @ X    (in, columns)

A bfloat16 copy of the whole weight is made only if the memory allowance permits. Otherwise panels of rows (for the
adjoint, of columns) are converted and multiplied one by one, which costs little more as they stay in cache. A 16-bit
weight is used directly in bfloat16, and converted to float32 in panels for exact products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsi_deploy.linalg.orthogonal import add_gram_, mirrored_
from rsi_deploy.linalg.products.gemm import product

PANEL_BYTES = 2 << 20
GRAM_BYTES = 16 << 20


@dataclass(kw_only=True)
class Operand:
    """One weight `W (out, in)` and its products.

    Attributes:
        weight: `(out, in)`, contiguous; float64, float32, bfloat16 or float16.
        scale: power of two that brings the largest entry of the weight near 1.
        allowance: bytes that copies of the weight, whole or in panels, may use.
    """

    weight: Tensor
    scale: float
    allowance: int
    _low: Tensor | None = None
    _buffer: Tensor | None = None

    @property
    def working(self) -> torch.dtype:
        """Dtype of exact products: float64 for float64 weights, else float32."""
        return working_dtype(self.weight)

    def forward(self, Y: Tensor) -> Tensor:
        """Return `W @ Y (out, columns)` in the working precision."""
        if self.weight.dtype == self.working:
            return product(self.weight, Y)
        X = _block(self.weight.shape[0], Y, self.working)
        for rows in self._panels(self.working):
            torch.mm(self._panel(rows, self.working), Y, out=X[rows])
        return X

    def adjoint(self, X: Tensor) -> Tensor:
        """Return `W^T @ X (in, columns)` in the working precision."""
        if self.weight.dtype == self.working:
            return product(self.weight.mT, X)
        Y = _block(self.weight.shape[1], X, self.working)
        for columns in self._panels(self.working, across=True):
            torch.mm(self._panel(columns, self.working, across=True).mT, X, out=Y[columns])
        return Y

    def low_forward(self, Y: Tensor) -> Tensor:
        """Return `W @ Y (out, columns)` in bfloat16, for `Y` in bfloat16."""
        if self._whole():
            return product(self._low_weight(), Y)
        X = _block(self.weight.shape[0], Y, torch.bfloat16)
        for rows in self._panels(torch.bfloat16):
            torch.mm(self._panel(rows, torch.bfloat16), Y, out=X[rows])
        return X

    def low_adjoint(self, X: Tensor) -> Tensor:
        """Return `W^T @ X (in, columns)` in bfloat16, for `X` in bfloat16."""
        if self._whole():
            return product(self._low_weight().mT, X)
        Y = _block(self.weight.shape[1], X, torch.bfloat16)
        for columns in self._panels(torch.bfloat16, across=True):
            torch.mm(self._panel(columns, torch.bfloat16, across=True).mT, X, out=Y[columns])
        return Y

    @property
    def tall(self) -> bool:
        """Return whether there are more rows than columns."""
        return self.weight.shape[0] > self.weight.shape[1]

    @property
    def longer(self) -> int:
        """Length of the longer side."""
        return max(self.weight.shape)

    def to_short(self, Z: Tensor) -> Tensor:
        """Return `scale W @ Z (out, columns)`, for a tall weight `scale W^T @ Z (in, columns)`; overwrites `Z`."""
        return (self.adjoint if self.tall else self.forward)(self._scaled_(Z))

    def to_long(self, B: Tensor) -> Tensor:
        """Return `scale W^T @ B (in, columns)`, for a tall weight `scale W @ B (out, columns)`."""
        return (self.forward if self.tall else self.adjoint)(B if self.scale == 1.0 else B * self.scale)

    def low_to_short(self, Z: Tensor) -> Tensor:
        """Return `to_short` in bfloat16."""
        return (self.low_adjoint if self.tall else self.low_forward)(self._scaled_(Z))

    def low_to_long(self, B: Tensor) -> Tensor:
        """Return `to_long` in bfloat16."""
        scaled = B if self.scale == 1.0 else B * self.scale
        return (self.low_forward if self.tall else self.low_adjoint)(scaled)

    def _scaled_(self, Z: Tensor) -> Tensor:
        return Z if self.scale == 1.0 else Z.mul_(self.scale)

    def gram(self, *, tall: bool, dtype: torch.dtype | None = None) -> Tensor:
        """Return the Gram matrix of `scale * W`: `(in, in)` if tall, else `(out, out)`; in blocks for another dtype."""
        dtype = dtype or self.working
        out_features, in_features = self.weight.shape
        n = in_features if tall else out_features
        G = torch.zeros(n, n, dtype=dtype, device=self.weight.device)
        size = max(GRAM_BYTES // (dtype.itemsize * n), 64)
        for start in range(0, out_features if tall else in_features, size):
            part = slice(start, start + size)
            block = (self.weight[part] if tall else self.weight[:, part]).to(dtype) * self.scale
            add_gram_(G, block if tall else block.mT)
        return mirrored_(G)

    def rounding(self, relative: float, X: Tensor, Y: Tensor) -> float:
        """Estimate the 2-norm of the weight's rounding to bfloat16, from `X = W @ Y` with a Gaussian `Y (in, columns)`.

        The norm of a matrix of independent entries is about the sum of its largest row and column norms. Row norms are
        estimated from `X` (Johnson and Lindenstrauss), column norms from every 16th row.

        Args:
            relative: root mean square of a relative rounding.
            X: `(out, columns)`.
            Y: block that gave `X`.
        """
        if self.weight.dtype == torch.bfloat16:
            return 0.0
        size = torch.linalg.vector_norm(Y, dtype=torch.float32) / self.weight.shape[1] ** 0.5
        rows = torch.linalg.vector_norm(X, dim=1, dtype=torch.float32).max() / size
        some = self.weight[::16]
        columns = torch.linalg.vector_norm(some, dim=0, dtype=torch.float32).max()
        columns = columns * (self.weight.shape[0] / len(some)) ** 0.5
        return relative * float(rows + columns)

    def forget(self) -> None:
        """Free the copies of the weight."""
        self._low = self._buffer = None

    def _whole(self) -> bool:
        return self.weight.dtype == torch.bfloat16 or 2 * self.weight.numel() <= self.allowance

    def _low_weight(self) -> Tensor:
        if self.weight.dtype == torch.bfloat16:
            return self.weight
        if self._low is None:
            self._low = self.weight.to(torch.bfloat16)
        return self._low

    def _panels(self, dtype: torch.dtype, *, across: bool = False) -> list[slice]:
        """Return slices of the rows, or of the columns, one for each panel."""
        length, width = reversed(self.weight.shape) if across else self.weight.shape
        budget = min(max(self.allowance, 1 << 16), PANEL_BYTES if self.weight.device.type == "cpu" else 64 << 20)
        size = max(min(budget // (width * dtype.itemsize), length), 1)
        size = max(size // 16 * 16, min(length, 16))
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    def _panel(self, part: slice, dtype: torch.dtype, *, across: bool = False) -> Tensor:
        """Return some rows or columns in another dtype; the next panel overwrites them."""
        source = self.weight[:, part] if across else self.weight[part]
        if self._buffer is None or self._buffer.dtype != dtype or self._buffer.numel() < source.numel():
            self._buffer = torch.empty(source.numel(), dtype=dtype, device=source.device)
        return self._buffer[: source.numel()].view(source.shape).copy_(source)


def _block(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty block with as many columns as another one, in the layout of `gemm.product`."""
    if like.is_cuda:
        return torch.empty(like.shape[1], rows, dtype=dtype, device=like.device).mT
    return torch.empty(rows, like.shape[1], dtype=dtype)


def working_dtype(weight: Tensor) -> torch.dtype:
    """Return float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
