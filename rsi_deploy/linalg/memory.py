"""Repeat a computation on the CPU if a GPU runs out of memory.

with suppress(torch.OutOfMemoryError):      the exception also frees what the attempt held
    result = compute(weight)
if result is None:
    result = compute(*on_cpu(weight))
"""

import torch
from torch import Tensor


def on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return copies on the CPU after emptying a GPU's cache, as the results need free memory there."""
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.empty_cache()
    return tuple(tensor.cpu() for tensor in tensors)
