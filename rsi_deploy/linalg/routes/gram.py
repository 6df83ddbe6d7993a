"""The Gram route: multiply the weight with itself once, and iterate on the resulting small square matrix.

    wide or square   G = W W^T (out, out)   B = basis(W Z), then  B = basis((G - c_j) B);   X = B, Y = W^T X
    tall             G = W^T W (in, in)     B = basis(W^T Z), the same;   W B = X R,  Y = B R^T

It finds the same subspace as the Chebyshev route (`routes.chebyshev`, which defines the shifts `c_j`) with
`out in min(out, in)` flops first and `2 min^2 columns` per iteration, where that route takes `4 out in columns`.
Squared singular values below `sqrt(eps) s_1` are lost in rounding, so the Chebyshev route takes over if the block
reaches them.

`G` takes `min(out, in)^2` numbers, never more than the weight itself.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import near_basis_
from rsi_deploy.linalg.products.gemm import product
from rsi_deploy.linalg.routes.chebyshev import MARGIN, Draw, iterate, orthonormal_result, shifts

# Below this s_k / s_1, squares in float32 do not resolve s_k: sqrt(eps) times a margin of 3.
RESOLVED = 1e-3


def gram(operand: Operand, draw: Draw, d: int, *, mixed: bool) -> tuple[Tensor, Tensor, str]:
    """Return `X (out, columns)`, orthonormal, `Y (in, columns)` with `W ~ X Y^T`, and the route that was used.

    Args:
        operand: weight.
        draw: returns the sketch `(side, columns)` of the longer side in the working precision.
        d: number of iterations, at least 1.
        mixed: whether the Chebyshev route may use bfloat16 if it takes over.
    """
    G = operand.gram(tall=operand.tall)
    B = operand.to_short(draw(operand.longer))
    for fraction in shifts(d):
        B = near_basis_(B)
        image = product(G, B)
        quotients = torch.linalg.vecdot(B, image, dim=0)
        least = float(quotients.min())
        if not least >= RESOLVED**2 * float(quotients.max()):
            del G, B, image
            return *iterate(operand, draw, shifts(d), mixed=mixed), "chebyshev"
        B = image.sub_(B, alpha=fraction * MARGIN * least)
    del G
    return *orthonormal_result(operand, B), "gram"
