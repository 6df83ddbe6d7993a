"""float32 products by oneDNN, which torch has aboard beside its BLAS.

`A @ B` in float32 is what torch's BLAS makes of it, in its own builds MKL. On processors of another maker than MKL's
that reaches as little as half of their speed, worst where the number of columns is no multiple of 16, as ranks are.
oneDNN, which torch takes for convolutions and bfloat16, has no such gaps; `kernel.rates` measures both.

torch opens oneDNN's float32 product only to its own compiler: `torch.ops.mkldnn._linear_pointwise(x, w, ...)`, `x w^T`
in float32 throughout. Where a version of torch has no such operator, or another one, `@` is taken.
"""

import torch
from torch import Tensor


def has_onednn(device: torch.device) -> bool:
    """Whether `by_onednn` works here, tried on a small product."""
    if device.type != "cpu":
        return False
    A, B = torch.arange(15.0).reshape(3, 5), torch.arange(20.0).reshape(5, 4)
    try:
        return all(torch.equal(by_onednn(left, B), left @ B) for left in (A, A.mT.contiguous().mT))
    except (AttributeError, RuntimeError, TypeError):
        return False


def by_onednn(A: Tensor, B: Tensor) -> Tensor:
    """`A @ B (m, n)`, contiguous, of float32 `A (m, k)`, by rows or by columns, and `B (k, n)`."""
    operator = torch.ops.mkldnn._linear_pointwise
    if A.stride(1) == 1:
        product: Tensor = operator(A, B.mT, None, "none", [], "")
        return product
    # oneDNN would copy `A`, most often the whole weight: it gets the block by columns instead.
    turned: Tensor = operator(B.mT.contiguous(), A, None, "none", [], "")
    return turned.mT.contiguous()
