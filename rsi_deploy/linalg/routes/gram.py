"""The Gram route: the weight is multiplied with itself once, and iterated on the small square that comes out.

    wide or square   G = W W^T (out, out)   B = basis(W Z), then  B = basis((G - c_j) B);   X = B, Y = W^T X
    tall             G = W^T W (in, in)     B = basis(W^T Z), the same;   W B = X R,  Y = B R^T

The same subspace as the Chebyshev route (`kernel.chebyshev`, whose shifts `c_j` these are) at `out in min(out, in)`
flops up front and `2 min^2 columns` an iteration, where that one takes `4 out in columns`. It squares the singular
values before they are rounded: what lies below `sqrt(eps) s_1` is lost, so it is left for the Chebyshev route where the
block reaches down there.

`G` takes `min(out, in)^2` numbers, never more than the weight itself.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import near_basis_
from rsi_deploy.linalg.products.gemm import product
from rsi_deploy.linalg.routes.chebyshev import MARGIN, Draw, finished, iterate, shifts

# The ratio s_k / s_1 below which squares in float32 no longer resolve s_k: sqrt(eps) times a margin of 3.
RESOLVED = 1e-3


def gram(operand: Operand, draw: Draw, d: int, *, mixed: bool) -> tuple[Tensor, Tensor, str]:
    """`X (out, columns)`, orthonormal, `Y (in, columns)` with `W ~ X Y^T`, and the route that was taken in the end.

    Args:
        operand: the weight.
        draw: makes the sketch `(side, columns)` in the working precision, here of the longer side.
        d: iterations, at least 1.
        mixed: for the Chebyshev route, where the weight turns out to need it.
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
    return *finished(operand, B), "gram"
