"""A device with little memory, simulated for torch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LittleMemory(TorchDispatchMode):
    """A torch mode that refuses the first result larger than a number of bytes with torch's out-of-memory error."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.refused = limit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not self.refused and result.nbytes > self.limit:
            self.refused = result.nbytes
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {result.nbytes} bytes.")
        return result
