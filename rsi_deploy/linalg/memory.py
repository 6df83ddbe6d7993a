"""Out of memory on a GPU: the same computation once more, on the CPU.

with suppress(torch.OutOfMemoryError):      with the exception goes what the attempt held
result = compute(weight)
if result is None:
result = compute(*on_cpu(weight))
"""

import torch
from torch import Tensor


def on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies on the CPU, after a GPU's cache is emptied: results need room there, in pieces of any size."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.empty_cache()
    return tuple(tensor.cpu() for tensor in tensors)
