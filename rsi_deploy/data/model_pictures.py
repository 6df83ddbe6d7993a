"""Pictures in the form that one model takes: its number of channels, then the preprocessing.

    gray, RGB or RGBA, uint8 or uint16 --> the model's channels --> preprocessing, if any --> input

Gray is the luma of ITU-R 601, as in Pillow. Alpha is dropped; if a model takes it and a picture has none, it is opaque.
Evaluation, calibration and the server all use this module, so that one file gives the same input everywhere.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.runtime.feeds.batch_axes import Dim
from rsi_deploy.runtime.feeds.inputs import InputSpec

Size = tuple[int, int]
Dims = Sequence[Dim]

CHANNELS = (1, 3, 4)
OF_FILES = 3
"""Channels for pictures in files if the model accepts any number."""


@dataclass(frozen=True, kw_only=True)
class ModelPictures:
    """Conversion of pictures to the input of one model.

    Attributes:
        steps: preprocessing; None for a model that takes unprocessed pictures.
        channels: channels that the model takes, 1, 3 or 4; None if the model accepts any number.
        shape: shape of the model's input.
        dtype: type of the model's input.
        sizes: (height, width) before and after -> number of pictures so far.
    """

    steps: Preprocessing | None
    channels: int | None = None
    shape: Dims = (None, None, None, None)
    dtype: Any = np.uint8
    sizes: Counter[tuple[Size, Size]] = field(default_factory=Counter)

    @classmethod
    def of_input(cls, steps: Preprocessing | None, spec: InputSpec, model: str = "the model") -> "ModelPictures":
        """Create the conversion for an input `(N, C, H, W)` or `(N, H, W, C)`, or gray pictures `(N, H, W)`.

        Raises:
            UsageError: The input has a number of channels that pictures cannot have.
        """
        axis = _channel_axis(steps, spec.shape)
        channels = 1 if len(spec.shape) == 3 else spec.shape[axis] if len(spec.shape) == 4 else None
        known = channels if isinstance(channels, int) else None
        if known is not None and known not in CHANNELS:
            layout = "NHWC" if axis == 1 else "NCHW"
            raise UsageError(
                f"{model} takes {spec}, {known} channels at axis {axis}, but pictures have 1 (gray), 3 (RGB) or 4 "
                "(RGBA)",
                hint=f"add --layout {layout} if the channels are at axis {4 - axis}, or give ready inputs as float32 "
                "in an .npz",
            )
        return cls(steps=steps, channels=known, shape=spec.shape, dtype=spec.dtype)

    def apply(self, images: Array) -> Array:
        """Convert a batch of pictures to inputs.

        Args:
            images: uint8 or uint16 `(N, H, W, C)`.

        Raises:
            UsageError: As `Preprocessing.apply`.
        """
        images = images if self.channels is None else with_channels(images, self.channels)
        if self.steps is None:
            return self._without_steps(images)
        inputs = self.steps.apply(images)
        axis = _channel_axis(self.steps, self.shape)
        height, width = inputs.shape[2:] if axis == 1 else inputs.shape[1:3]
        self.sizes[(images.shape[1], images.shape[2]), (height, width)] += len(images)
        return inputs.squeeze(axis) if len(self.shape) == 3 else inputs

    def apply_file(self, picture: Array) -> Array:
        """Convert one decoded file `(H, W, C)` to an input without the batch axis."""
        channels = self.channels or OF_FILES
        return np.asarray(self.apply(with_channels(picture[None], channels))[0])

    def notes(self, option: str) -> list[str]:
        """Return notes on the pictures so far; `option` is the command-line option of the data."""
        if self.steps is None or self.steps.resize is None or not self.sizes:
            return []
        needless = sum(count for (before, after), count in self.sizes.items() if self._is_needless(before, after))
        if 2 * needless <= self.sizes.total():
            return []
        who = "every picture" if needless == self.sizes.total() else "most pictures"
        height, width = max(self.sizes, key=lambda sizes: self.sizes[sizes])[1]
        return [
            f"{option}: {who} already had the size of the model's input, {height} x {width}, but "
            f"{self.steps.size_words()} "
            f"was applied; type --resize none --crop none to keep the size"
        ]

    def _is_needless(self, before: Size, after: Size) -> bool:
        """Return whether a picture is resized although it already has the right size."""
        return before == after and self.steps is not None and self.steps.resized_size(*before) != before

    def _without_steps(self, images: Array) -> Array:
        """Convert pictures to the range of the input's type, without preprocessing."""
        if self.dtype == np.uint8 and images.dtype == np.uint16:
            images = ((images.astype(np.uint32) + 128) // 257).astype(np.uint8)
        elif self.dtype == np.uint16 and images.dtype == np.uint8:
            images = images.astype(np.uint16) * 257
        if len(self.shape) == 3:
            return images[..., 0]
        return images if _channel_axis(None, self.shape) == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def with_channels(images: Array, channels: int) -> Array:
    """Convert pictures `(N, H, W, C)` to 1, 3 or 4 channels in the same type."""
    present = images.shape[3]
    if present == channels:
        return images
    if present == 4:
        return with_channels(images[..., :3], channels)
    if channels == 1:
        luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)  # Pillow's, in 65536ths
        return ((luma + 0x8000) >> 16).astype(images.dtype)[..., None]
    colour = np.broadcast_to(images, (*images.shape[:3], 3))
    if channels == 3:
        return colour
    opaque = np.full((*images.shape[:3], 1), np.iinfo(images.dtype).max, images.dtype)
    return np.concatenate([colour, opaque], axis=3)


def preset_note(steps: Preprocessing | None, options: Preprocessing | None, origin: str) -> list[str]:
    """Return a note on what a model's preprocessing does to the size of pictures, unless options determine it.

    Args:
        steps: preprocessing that is applied.
        options: fields that the user has set.
        origin: source of the other fields.
    """
    settled = {"resize", "crop"} & (options.model_fields_set if options else set())
    own = None if steps is None else steps.model_copy(update=dict.fromkeys(settled))
    if own is None or not (words := own.size_words()):
        return []
    turn_off = " ".join(f"--{name} none" for name in ("resize", "crop") if getattr(own, name) is not None)
    return [f"pictures go through the preprocessing of {origin}: {words}; {turn_off} turns it off"]


def _channel_axis(steps: Preprocessing | None, shape: Dims) -> int:
    """Return 1 or 3 by the layout; without preprocessing 3, unless only axis 1 can be channels."""
    if steps is not None:
        return 1 if steps.layout == "NCHW" else 3
    return 1 if len(shape) == 4 and shape[3] not in CHANNELS and shape[1] in CHANNELS else 3
