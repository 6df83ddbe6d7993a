"""Products with a weight, in its own precision or, block of rows by block of rows, in bfloat16.

    forward   X = W @ Y      (out, columns)
    adjoint   Y = W^T @ X    (in, columns)

A bfloat16 copy of the whole weight is made only where the caller's allowance holds it; else `panel` rows at a time are
cast, multiplied and forgotten: in cache, they cost little more. The adjoint adds its panels up in float32.

A 16-bit weight is multiplied as it is in bfloat16, and cast to float32 in panels for the exact products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import add_gram_, mirrored_

PANEL_BYTES = 2 << 20
GRAM_BYTES = 16 << 20


@dataclass(kw_only=True)
class Operand:
    """One weight `W (out, in)` and how it is multiplied.

    Attributes:
        weight: `(out, in)`, contiguous; float64, float32, bfloat16 or float16.
        scale: a power of two that brings the largest entry of the weight near 1.
        allowance: bytes that copies of the weight, whole or in panels, may take.
    """

    weight: Tensor
    scale: float
    allowance: int
    _low: Tensor | None = None
    _buffer: Tensor | None = None

    @property
    def working(self) -> torch.dtype:
        """The dtype of exact products: float64 for float64 weights, else float32."""
        return working_dtype(self.weight)

    def forward(self, Y: Tensor) -> Tensor:
        """`W @ Y (out, columns)` in the working precision."""
        if self.weight.dtype == self.working:
            return self.weight @ Y
        X = torch.empty(self.weight.shape[0], Y.shape[1], dtype=self.working, device=Y.device)
        for rows in self._panels(self.working):
            torch.mm(self._panel(rows, self.working), Y, out=X[rows])
        return X

    def adjoint(self, X: Tensor) -> Tensor:
        """`W^T @ X (in, columns)` in the working precision."""
        if self.weight.dtype == self.working:
            return self.weight.mT @ X
        Y = torch.zeros(self.weight.shape[1], X.shape[1], dtype=self.working, device=X.device)
        for rows in self._panels(self.working):
            Y.addmm_(self._panel(rows, self.working).mT, X[rows])
        return Y

    def low_forward(self, Y: Tensor) -> Tensor:
        """`W @ Y (out, columns)` in bfloat16, of `Y` in bfloat16."""
        if self._whole():
            return self._low_weight() @ Y
        X = torch.empty(self.weight.shape[0], Y.shape[1], dtype=torch.bfloat16, device=Y.device)
        for rows in self._panels(torch.bfloat16):
            torch.mm(self._panel(rows, torch.bfloat16), Y, out=X[rows])
        return X

    def low_adjoint(self, X: Tensor) -> Tensor:
        """`W^T @ X (in, columns)` of `X` in bfloat16: bfloat16, or float32 where it is summed over panels."""
        if self._whole():
            return self._low_weight().mT @ X
        Y = torch.zeros(self.weight.shape[1], X.shape[1], dtype=torch.float32, device=X.device)
        part = torch.empty_like(Y, dtype=torch.bfloat16)
        for rows in self._panels(torch.bfloat16):
            Y.add_(torch.mm(self._panel(rows, torch.bfloat16).mT, X[rows], out=part))
        return Y

    def gram(self, *, tall: bool, dtype: torch.dtype | None = None) -> Tensor:
        """`W^T W (in, in)` of a tall weight, else `W W^T (out, out)`, of `scale * W`; by blocks in another `dtype`."""
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
        """About the 2-norm of the weight's rounding to bfloat16, from `X = W @ Y` with a Gaussian `Y (in, columns)`.

        A matrix of independent entries is about as large as its largest row and column norm together. The rows' are
        read off `X` (Johnson and Lindenstrauss), the columns' off every 16th row.

        Args:
            relative: root mean square of a relative rounding.
            X: `(out, columns)`.
            Y: what it was made from.
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
        """Let the copies go."""
        self._low = self._buffer = None

    def _whole(self) -> bool:
        return self.weight.dtype == torch.bfloat16 or 2 * self.weight.numel() <= self.allowance

    def _low_weight(self) -> Tensor:
        if self.weight.dtype == torch.bfloat16:
            return self.weight
        if self._low is None:
            self._low = self.weight.to(torch.bfloat16)
        return self._low

    def _panels(self, dtype: torch.dtype) -> list[slice]:
        out_features, in_features = self.weight.shape
        budget = min(max(self.allowance, 1 << 16), PANEL_BYTES if self.weight.device.type == "cpu" else 64 << 20)
        rows = max(min(budget // (in_features * dtype.itemsize), out_features), 1)
        rows = max(rows // 16 * 16, min(rows, 16))
        return [slice(start, start + rows) for start in range(0, out_features, rows)]

    def _panel(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Some rows in another dtype, until the next panel takes their place: fresh memory for each would cost more."""
        source = self.weight[rows]
        if self._buffer is None or self._buffer.dtype != dtype or len(self._buffer) < len(source):
            self._buffer = torch.empty(source.shape, dtype=dtype, device=source.device)
        return self._buffer[: len(source)].copy_(source)


def working_dtype(weight: Tensor) -> torch.dtype:
    """float64 for float64 weights, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
