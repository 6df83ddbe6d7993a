"""The Gram route: the weight is multiplied with itself once, and iterated on the small square that comes out.

    wide or square   G = W W^T (out, out)    X = basis(W Y), then q - 1 times  X = basis(G X);    Y = W^T X
    tall             G = W^T W (in, in)      q - 1 times  Y = basis(G Y);    X = basis(W Y),      Y = W^T X

The same subspace as the direct route at `(out + in) min(out, in)^2` flops up front and `2 min^2 columns` an iteration,
where the direct route takes `4 out in columns`. It squares the singular values before they are rounded: what lies below
`sqrt(eps) s_1` is lost, so it is left for the direct route where the block reaches down there.

`G` takes `min(out, in)^2` numbers, never more than the weight itself.
"""

import torch
from torch import Tensor

from rsi_deploy.kernel.direct import Draw, direct, unit_
from rsi_deploy.kernel.orthogonal import near_basis_, orthonormal_
from rsi_deploy.kernel.products import Operand

# The ratio s_k / s_1 below which squares in float32 no longer resolve s_k: sqrt(eps) times a margin of 3.
RESOLVED = 1e-3


def gram(operand: Operand, draw: Draw, q: int, *, mixed: bool) -> tuple[Tensor, Tensor, str]:
    """`X (out, columns)`, orthonormal, `Y = W^T X (in, columns)`, and the route that was taken in the end.

    Args:
        operand: the weight.
        draw: makes the sketch `(in, columns)` in the working precision.
        q: iterations, at least 1.
        mixed: for the direct route, where the weight turns out to need it.
    """
    tall = operand.weight.shape[0] > operand.weight.shape[1]
    G = operand.gram(tall=tall)
    block = unit_(draw()) if tall else near_basis_(operand.forward(unit_(draw(), operand.scale)))
    for index in range(q - 1):
        image = G @ block
        if index or not tall:
            norms = torch.linalg.vector_norm(image, dim=0)
            if not bool(norms.min() >= RESOLVED**2 * norms.max()):
                del G, block, image
                return *direct(operand, draw, q, mixed=mixed), "direct"
        block = near_basis_(unit_(image))
    del G
    X = orthonormal_(operand.forward(unit_(block, operand.scale)) if tall else block)
    return X, operand.adjoint(X), "gram"
