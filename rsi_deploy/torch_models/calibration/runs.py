"""Run a torch module on calibration data: batches on its device, and the outputs for measuring a distance."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.torch_models.calibration.calls import Stopped
from rsi_deploy.torch_models.calibration.rows import find_mask

Arguments = tuple[Any, ...]


class Runs:
    """Runs of `module` on its own device, without gradients.

    Args:
        module: module in evaluation mode.
        batches: function that returns a fresh iterator over tuples of positional arguments.
        mask: index of the argument that is a padding mask; None to look for it in the first batch.

    Attributes:
        first: first batch.
        count: number of batches.
        samples: number of samples in all batches.

    Raises:
        UsageError: there are no batches.
    """

    def __init__(self, module: nn.Module, batches: Callable[[], Iterable[Arguments]], mask: int | None) -> None:
        self._module, self._source = module, batches
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        first, count, samples = None, 0, 0
        for batch in batches():
            first = self._placed(batch) if first is None else first
            count += 1
            samples += samples_of(_arguments(batch))
        if first is None:
            raise UsageError("there are no calibration data: the iterator of batches is empty; give at least one batch")
        self.first, self.count, self.samples = first, count, samples
        self._mask = find_mask(first) if mask is None else mask

    def batches(self) -> Iterator[Arguments]:
        """Return the batches on the module's device."""
        return (self._placed(batch) for batch in self._source())

    def kept(self, batch: Arguments) -> Tensor | None:
        """Return the mask as bool `(N, L)`, False for padding; None without a mask."""
        mask = batch[self._mask] if self._mask is not None and self._mask < len(batch) else None
        return mask != 0 if isinstance(mask, Tensor) else None

    def run(self, arguments: Arguments, watch: AbstractContextManager[Any] | None = None) -> Any:
        """Return the module's output, or None if `watch` stopped the run.

        Raises:
            UsageError: the module fails on these arguments.
        """
        try:
            with torch.no_grad(), watch or nullcontext():
                return self._module(*arguments)
        except Stopped:
            return None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shown = ", ".join(f"{a.dtype} {tuple(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in arguments)
            raise UsageError(
                f"{type(self._module).__name__} cannot be run on the calibration data: called with ({shown}) it raises "
                f"{type(error).__name__}: {error}; give batches that are its positional arguments"
            ) from error

    def output(self, batch: Arguments, watch: AbstractContextManager[Any] | None = None) -> Tensor:
        """Return the first floating output in float32; with a mask, tokens `(tokens, 1, ...)` of `(N, L, ...)`."""
        leaves = pytree.tree_leaves(self.run(batch, watch))
        z = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim), None)
        if z is None:
            raise ModelError(
                f"{type(self._module).__name__} has no floating output to measure a distance of"
                f"; calibrate a module with one, or leave out calib"
            )
        kept = self.kept(batch)
        if kept is not None and z.ndim > 2 and z.shape[:2] == kept.shape:
            z = z[kept.to(z.device)][:, None]  # three axes, because two would mean class scores
        return z.float()

    def spread_outputs(self, samples: int, limit: int) -> tuple[list[Arguments], Tensor]:
        """Return about `samples` samples, evenly spaced over the data, and the module's outputs up to `limit` bytes.

        Data are often sorted by class, so the first samples would represent few classes.

        Raises:
            ModelError: NaN or infinite outputs.
        """
        parts, seen = [], 0
        for number, batch in enumerate(self.batches()):
            if number % max(1, self.count // samples) == 0 and seen < samples:
                parts.append(part(batch, math.ceil(samples / self.count)))
                seen += samples_of(parts[-1])
        batches, outputs = _merged(parts, samples_of(self.first)), []
        for batch in batches:
            outputs.append(self.output(batch))
            if sum(z.nbytes for z in outputs) >= limit:
                break
        dense = stacked(outputs)
        if not torch.isfinite(dense).all():
            name = type(self._module).__name__
            raise ModelError(
                f"{name}: its output on the calibration data holds NaN or infinite values"
                f"; remove those samples, or repair the weights"
            )
        return batches[: len(outputs)], dense

    def _placed(self, batch: Arguments) -> Arguments:
        return tuple(a.to(self._device) if isinstance(a, Tensor) else a for a in _arguments(batch))


def samples_of(batch: Arguments) -> int:
    """Return the number of samples in a batch, which is the length of its first tensor and at least 1."""
    return max(1, next((len(a) for a in batch if isinstance(a, Tensor) and a.ndim), 1))


def _arguments(batch: Any) -> Arguments:
    if not isinstance(batch, (tuple, list)):
        raise UsageError(f"a batch must be a tuple of positional arguments, but got {type(batch).__name__}")
    return tuple(batch)


def stacked(outputs: Sequence[Tensor]) -> Tensor:
    """Concatenate outputs. Outputs of different shapes are flattened to rows of the last axis."""
    if len({z.shape[1:] for z in outputs}) > 1:
        outputs = [z.reshape(-1, 1, z.shape[-1]) for z in outputs]
    return torch.cat(list(outputs))


def part(batch: Arguments, count: int) -> Arguments:
    """Return `count` evenly spaced samples of an aligned batch, or the whole batch if it is not aligned."""
    size = samples_of(batch)
    if count >= size or not aligned(batch):
        return batch
    return tuple(a[torch.arange(count, device=a.device) * size // count] for a in batch)


def _merged(parts: Sequence[Arguments], size: int) -> list[Arguments]:
    """Merge neighbouring batches of one shape up to `size` samples."""
    batches: list[Arguments] = []
    for part in parts:
        last = batches[-1] if batches else ()
        fits = aligned(part) and aligned(last) and [a.shape[1:] for a in part] == [a.shape[1:] for a in last]
        if fits and samples_of(last) + samples_of(part) <= size:
            batches[-1] = tuple(torch.cat(pair) for pair in zip(last, part, strict=True))
        else:
            batches.append(part)
    return batches


def aligned(batch: Arguments) -> bool:
    """Return whether a batch consists of tensors with equal numbers of samples."""
    return all(isinstance(a, Tensor) and a.ndim and len(a) == samples_of(batch) for a in batch)
