"""Preprocessing from pictures to model inputs, as a frozen settings object.

    pictures (N, H, W, C) --resize--> --centre crop--> * scale --> - mean --> / std --> dtype, layout

Steps and rounding are those of torchvision's `ImageClassification` on Pillow images (antialiased resize of 8-bit
values). 16-bit pictures are divided by 257 to the 8-bit range, without rounding. The settings are stored in the ONNX
file under `METADATA_KEY`, so that evaluation and serving use the inputs that the model was trained on.
"""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ValidationError, model_validator

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.io.pictures import UnknownRangeError, picture_array

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SIDE = 7_000  # pixels; the square of it is the largest picture

METADATA_KEY = "rsi_deploy.preprocessing"

_RESIZABLE = (1, 3, 4)  # channels that Pillow can resize


class Preprocessing(BaseModel, frozen=True, extra="forbid"):
    """The steps from 8-bit pictures to model inputs.

    Attributes:
        layout: axes of the result, `NCHW` or `NHWC`.
        resize: pixels of the shorter side (the other follows, rounded down), or `(height, width)`; an explicit None
            turns off a model's own (see `over`).
        crop: `(height, width)` of the centre crop; a smaller picture gets a black border.
        interpolation: filter of the resize, always antialiased as in Pillow.
        scale: factor for the 8-bit values.
        mean: subtracted after scaling; one value per channel, one for all, or none.
        std: divisor after that; as many values as `mean`, none of them zero.
        dtype: type of the result. The arithmetic is in float32, or in float64 for a float64 result.

    Raises:
        UsageError: `mean` and `std` have different lengths, a `std` is zero, or a size is below one pixel.
    """

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: Literal["float32", "float16", "float64"] = "float32"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.mean) != len(self.std):
            raise UsageError(
                f"preprocessing: mean has {len(self.mean)} values and std has {len(self.std)}",
                hint="give the same number of both (mean 0 and std 1 leave a channel as it is)",
            )
        if any(value == 0 for value in self.std):
            raise UsageError(
                f"preprocessing: std divides, so no value may be zero, but got {self.std}",
                hint="type 1 for no division",
            )
        if not all(math.isfinite(value) for value in (self.scale, *self.mean, *self.std)):
            raise UsageError(
                f"preprocessing: scale, mean and std must be finite numbers, but got {self.scale}, "
                f"{self.mean}, {self.std}"
            )
        sizes = (self.resize,) if isinstance(self.resize, int) else (self.resize or ())
        if any(not 1 <= size <= MOST_SIDE for size in (*sizes, *(self.crop or ()))):
            raise UsageError(
                f"preprocessing: sizes are 1 to {MOST_SIDE} pixels, but got resize={self.resize}, crop={self.crop}"
            )
        return self

    @classmethod
    def from_torchvision(cls, transform: Any) -> Self:
        """Read the settings of a torchvision `ImageClassification` transform (`weights.transforms()`).

        Raises:
            UsageError: The transform is of another type or has an unsupported interpolation.
        """
        missing = [
            name
            for name in ("crop_size", "resize_size", "interpolation", "mean", "std")
            if not hasattr(transform, name)
        ]
        if missing:
            raise UsageError(
                f"{type(transform).__name__} has no {', '.join(missing)}",
                hint="expected torchvision's ImageClassification, e.g. ResNet18_Weights.DEFAULT.transforms()",
            )
        interpolation = transform.interpolation.value
        if interpolation not in ("nearest", "bilinear", "bicubic"):
            raise UsageError(f"interpolation must be nearest, bilinear or bicubic, but got {interpolation!r}")
        resize, crop = list(transform.resize_size), list(transform.crop_size)
        return cls(
            resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
            crop=(crop[0], crop[-1]),
            interpolation=interpolation,
            mean=tuple(transform.mean),
            std=tuple(transform.std),
        )

    @classmethod
    def from_metadata(cls, text: str) -> Self:
        """Read settings that `to_metadata` wrote.

        Raises:
            UsageError: The text is not JSON, or has unknown fields.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole text"
            raise UsageError(
                f"metadata {METADATA_KEY}: {where}: {first['msg']}", hint="export the model again"
            ) from error

    @classmethod
    def stored(cls, metadata: Mapping[str, str]) -> Self | None:
        """Read the settings from a model's metadata; None if there are none.

        Raises:
            UsageError: As `from_metadata`.
        """
        text = metadata.get(METADATA_KEY)
        return None if text is None else cls.from_metadata(text)

    def over(self, base: "Preprocessing | None") -> "Preprocessing":
        """Return the fields that are set here (including to None), and those of `base` for the rest."""
        if base is None:
            return self
        return Preprocessing(**{**base.model_dump(), **self.model_dump(include=self.model_fields_set)})

    def to_metadata(self) -> str:
        """Return compact JSON with the fields in the order of their declaration: equal settings give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"))

    def apply(self, images: Array) -> Array:
        """Convert a batch of pictures to model inputs.

        Args:
            images: uint8 or uint16 `(N, H, W, C)`.

        Returns:
            `(N, C, h, w)` or `(N, h, w, C)` by `layout`, in `dtype`.

        Raises:
            UsageError: The images have another type or number of axes, or a number of channels that does not fit
                `mean` or that Pillow cannot resize.
        """
        if images.dtype not in (np.uint8, np.uint16) or images.ndim != 4:
            raise UsageError(f"expected uint8 or uint16 images (N, H, W, C), but got {images.dtype} {images.shape}")
        channels = images.shape[3]
        if len(self.mean) not in (0, 1, channels):
            raise UsageError(
                f"mean and std have {len(self.mean)} values, but the images have {channels} channels",
                hint="give one value for each channel",
            )
        if images.dtype == np.uint16:
            images = images / np.float32(257)
        if self.resize is not None:
            images = np.stack([self._resized(image) for image in images])
        if self.crop is not None:
            images = _centre_crop(images, *self.crop)
        work = np.float64 if self.dtype == "float64" else np.float32
        values: Array = np.multiply(images, self.scale, dtype=work)
        if self.mean:
            values = (values - np.asarray(self.mean, work)) / np.asarray(self.std, work)
        if self.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, dtype=self.dtype)

    def apply_image(self, image: "Image") -> Array:
        """Convert one Pillow image to one model input without the batch axis.

        Gray, RGB and RGBA images keep their channels; any other mode (palette, CMYK...) becomes RGB. The image is
        rotated as its EXIF orientation says.

        Returns:
            `(C, h, w)` or `(h, w, C)` by `layout`, in `dtype`.

        Raises:
            UsageError: The range of the pixels is not known.
        """
        try:
            array = picture_array(image)
        except UnknownRangeError as error:
            raise UsageError(f"the image has {error}", hint="scale its pixels to 8 or 16 bits first") from error
        array = array if image.mode == "RGBA" else array[..., :3]
        return np.asarray(self.apply(array[None])[0])

    def describe(self) -> str:
        """Describe the steps in one sentence for a model card."""
        steps = [words] if (words := self.size_words()) else []
        if self.scale != 1:
            by = "divide by 255" if self.scale == 1 / 255 else f"multiply by {self.scale:g}"
            steps.append(by)
        if self.mean:
            mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
            steps.append(f"subtract the mean ({mean}) and divide by the standard deviation ({std})")
        steps.append(f"pass {self.dtype} in {self.layout} order")
        return f"From 8-bit images: {'; '.join(steps)}."

    def size_words(self) -> str:
        """Describe how the size of pictures changes; "" if it does not."""
        steps = []
        if isinstance(self.resize, int):
            steps.append(f"resize the shorter side to {self.resize} pixels ({self.interpolation}, antialiased)")
        elif self.resize:
            steps.append(f"resize to {self.resize[0]} x {self.resize[1]} ({self.interpolation}, antialiased)")
        if self.crop:
            steps.append(f"crop the centre {self.crop[0]} x {self.crop[1]}")
        return "; ".join(steps)

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of a picture of this size after the resize and before the crop."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def _resized(self, image: Array) -> Array:
        """Resize `(H, W, C)`, uint8 or float32 in the 8-bit range, with Pillow."""
        from PIL import Image

        height, width, channels = image.shape
        if channels not in _RESIZABLE:
            raise UsageError(f"resize takes images of 1, 3 or 4 channels, but got {channels}")
        new_height, new_width = self.resized_size(height, width)
        if not 0 < new_height * new_width <= MOST_SIDE**2:
            raise UsageError(
                f"an image of {height} x {width} would become {new_height} x {new_width}",
                hint="set resize to (height, width)",
            )
        if (new_height, new_width) == (height, width):
            return image
        filter_, size = Image.Resampling[self.interpolation.upper()], (new_width, new_height)
        if image.dtype != np.uint8:  # Pillow resizes floats one channel at a time
            planes = [np.asarray(Image.fromarray(plane).resize(size, filter_)) for plane in np.moveaxis(image, 2, 0)]
            return np.asarray(
                np.clip(np.stack(planes, axis=2), 0, 255)
            )  # bicubic overshoots; Pillow clips 8-bit pictures too
        picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        return np.asarray(picture.resize(size, filter_)).reshape(new_height, new_width, channels)


def _centre_crop(images: Array, height: int, width: int) -> Array:
    """Crop `(N, H, W, C)` to `(N, height, width, C)`; smaller pictures get a border of zeros, as in torchvision."""
    pad_h, pad_w = max(height - images.shape[1], 0), max(width - images.shape[2], 0)
    if pad_h or pad_w:
        # the odd pixel goes to the bottom and the right
        sides = ((0, 0), (pad_h // 2, (pad_h + 1) // 2), (pad_w // 2, (pad_w + 1) // 2), (0, 0))
        images = np.pad(images, sides)
    # round() is half-to-even here, and in torchvision
    top, left = round((images.shape[1] - height) / 2), round((images.shape[2] - width) / 2)
    return images[:, top : top + height, left : left + width]
