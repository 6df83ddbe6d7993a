"""How the response of a site follows from its data, for callers that compute it themselves.

The response is the output of the node without bias, activation and attention.
"""

import enum
from dataclasses import dataclass


class Contraction(enum.Enum):
    """The arithmetic of an operator, by which a caller chooses the function that differentiates it."""

    MATMUL = "MatMul of ONNX"
    GEMM = "Gemm of ONNX, with transA, transB, alpha, beta and C"
    CONV = "Conv of ONNX"
    EINSUM = "Einsum of ONNX; the equation is an attribute of the node"


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """Orders of axes in which the response is `data @ weight^T` over the last axes.

    Attributes:
        data: Order of the data's axes: those of the rows, then those of the weight's columns. () leaves it.
        output: Order of the output's axes: those of the same rows, then those of the weight's rows. () leaves it.
    """

    data: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
