"""float32 products by oneDNN, which torch has aboard beside its BLAS.

`A @ B` in float32 is what torch's BLAS makes of it, in its own builds MKL. On processors of another maker than MKL's
that reaches as little as half of their speed, worst where the number of columns is no multiple of 16, as ranks are.
oneDNN, which torch takes for convolutions and bfloat16, has no such gaps; `kernel.rates` measures both.

torch opens oneDNN's float32 product only to its own compiler: `torch.ops.mkldnn._linear_pointwise(x, w, ...)`, `x w^T`
in float32 throughout. Where a version of torch has no such operator, or another one, `@` is taken. For tensors with
gaps between their rows oneDNN has none but its reference loops, hundreds of times slower: those are left to `@`.
"""

import time

import torch
from torch import Tensor

# A small product that takes so many times as long as `@` is made by oneDNN's reference loops.
REFERENCE = 10.0


def has_onednn(device: torch.device) -> bool:
    """Whether `by_onednn` works here, and not by loops: tried on small products."""
    if device.type != "cpu":
        return False
    A, B = torch.arange(256.0 * 300).reshape(256, 300) / 1e4, torch.arange(300.0 * 50).reshape(300, 50) / 1e4
    try:
        return all(_does(left, B) for left in (A, A.mT.contiguous().mT))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _does(A: Tensor, B: Tensor) -> bool:
    """Whether it gives the product, and in a time that is no loop's (the best of three)."""
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
    """Whether a matrix is stored without gaps, by rows or by columns."""
    return A.is_contiguous() or A.mT.is_contiguous()


def by_onednn(A: Tensor, B: Tensor) -> Tensor:
    """`A @ B (m, n)`, contiguous, of dense float32 `A (m, k)` and `B (k, n)`."""
    operator = torch.ops.mkldnn._linear_pointwise
    if A.is_contiguous():
        product: Tensor = operator(A, B.mT, None, "none", [], "")
        return product
    # oneDNN would copy `A`, most often the whole weight: it gets the block by columns instead.
    turned: Tensor = operator(B.mT.contiguous(), A, None, "none", [], "")
    return turned.mT.contiguous()
