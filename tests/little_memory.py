"""A device whose memory is soon full, as far as torch can tell."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LittleMemory(TorchDispatchMode):
    """A device that holds no result above so many bytes until it has once said so, as torch's own allocator does."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.refused = limit, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not self.refused and result.nbytes > self.limit:
            self.refused = result.nbytes
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {result.nbytes} bytes.")
        return result
