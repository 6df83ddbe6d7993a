"""Between numpy and torch, without a copy and with bfloat16."""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch


def as_torch(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's memory, bfloat16 included; it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # memory maps are read-only, and so are we
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """An array on the tensor's memory, bfloat16 included."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
