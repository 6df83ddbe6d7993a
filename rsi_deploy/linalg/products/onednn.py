"""float32 products by oneDNN, which torch includes beside its BLAS.

`A @ B` in float32 uses torch's BLAS, in its official builds MKL. On processors of other makers that reaches as little
as half of their speed, in particular if the number of columns is not a multiple of 16, as is usual for ranks. oneDNN,
which torch uses for convolutions and bfloat16, has no such gaps; `products.rates` measures both.

torch exposes oneDNN's float32 product only to its compiler: `torch.ops.mkldnn._linear_pointwise(x, w, ...)`, `x w^T` in
float32 throughout. If a version of torch lacks this operator or changes it, `@` is used. For tensors with gaps between
their rows oneDNN only has reference loops, hundreds of times slower, so those use `@` too.
"""

import time

import torch
from torch import Tensor

# A small product that takes this many times as long as `@` uses oneDNN's reference loops.
REFERENCE = 10.0


def has_onednn(device: torch.device) -> bool:
    """Return whether `by_onednn` works here without reference loops, tested on small products."""
    if device.type != "cpu":
        return False
    A, B = torch.arange(256.0 * 300).reshape(256, 300) / 1e4, torch.arange(300.0 * 50).reshape(300, 50) / 1e4
    try:
        return all(_does(left, B) for left in (A, A.mT.contiguous().mT))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _does(A: Tensor, B: Tensor) -> bool:
    """Return whether it gives the product in a time that excludes reference loops (best of three)."""
    taken, plain = [], []
    for _ in range(3):
        started = time.perf_counter()
        found = by_onednn(A, B)
        between = time.perf_counter()
        expected = A @ B
        plain.append(time.perf_counter() - between)
        taken.append(between - started)
    return torch.allclose(found, expected, rtol=1e-5) and min(taken) < REFERENCE * min(plain)


def is_dense(A: Tensor) -> bool:
    """Return whether a matrix is stored without gaps, by rows or by columns."""
    return A.is_contiguous() or A.mT.is_contiguous()


def by_onednn(A: Tensor, B: Tensor) -> Tensor:
    """Return `A @ B (m, n)`, contiguous, of dense float32 `A (m, k)` and `B (k, n)`."""
    operator = torch.ops.mkldnn._linear_pointwise
    if A.is_contiguous():
        product: Tensor = operator(A, B.mT, None, "none", [], "")
        return product
    # oneDNN would copy `A`, often the whole weight, so it gets the transposed product instead.
    turned: Tensor = operator(B.mT.contiguous(), A, None, "none", [], "")
    return turned.mT.contiguous()
