"""Conversion between numpy and torch without a copy, including bfloat16."""

import warnings

import ml_dtypes
import numpy as np
import torch

from rsi_deploy.core.types import Array


def as_torch(array: Array) -> torch.Tensor:
    """Return a tensor on the array's memory; it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # memory maps are read-only, and nothing writes to the tensor
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def as_numpy(tensor: torch.Tensor) -> Array:
    """Return an array on the tensor's memory."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
