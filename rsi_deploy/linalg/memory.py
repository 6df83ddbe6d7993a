"""Out of memory on a GPU: the same computation once more, on the CPU."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def or_on_cpu(compute: Callable[..., Result], *tensors: Tensor) -> tuple[Result, bool]:
    """`compute(*tensors)`, and whether a GPU's memory did not hold it: then it is of their copies on the CPU."""
    try:
        return compute(*tensors), False
    except torch.OutOfMemoryError:
        pass  # with the exception goes what the attempt held
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.empty_cache()  # room for what comes back, in pieces of any size
    return compute(*(tensor.cpu() for tensor in tensors)), True
