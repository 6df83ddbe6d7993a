"""Read pictures from any source, in formats whose decoders run no other program, with a limit on the pixels.

A picture becomes an array `(height, width, channels)` with 1 (gray), 3 (RGB) or 4 (RGBA) channels, rotated as its EXIF
orientation says. Of several frames the first is read.

    Pillow's mode                            array
    1, L                                     uint8, gray
    P, RGB, CMYK, YCbCr, LAB, HSV            uint8, RGB
    the same with transparency, LA           uint8, RGBA
    I;16, I of a PNG or PPM, F of 0 to 1     uint16, gray: the pixels' own range becomes 0 to 65535, nothing is clipped
    other I and F                            refused: their range is unknown
"""

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from rsi_deploy.core.types import Array

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats by Pillow's names; Pillow reads more, some of them by running Ghostscript."""

MOST_PIXELS = 50_000_000

_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second

Result = TypeVar("Result")


class TooLargeError(ValueError):
    """A picture of more than `MOST_PIXELS`."""


class UnknownRangeError(ValueError):
    """A picture whose pixels have no known range; the message describes them."""


def read_picture(source: str | Path | IO[bytes]) -> Array:
    """Read a picture as uint8 or uint16 `(height, width, channels)`; see the module's docstring.

    Raises:
        TooLargeError: It has more than `MOST_PIXELS`; this is checked before decoding.
        UnknownRangeError: Its pixels are 32-bit integers, or floats outside 0 to 1.
        ValueError: It cannot be read.
    """
    try:
        return with_picture(source, picture_array)
    except ValueError:
        raise
    except Exception as error:  # a conversion that the installed Pillow does not support
        raise ValueError(str(error)[:200] or type(error).__name__) from error


def picture_array(picture: "Image") -> Array:
    """Convert a picture of Pillow as `read_picture` does.

    Raises:
        UnknownRangeError: As in `read_picture`.
    """
    largest = _largest_value(picture)
    white_is_zero = _tiff_tag(picture, _PHOTOMETRIC) == _WHITE_IS_ZERO  # Pillow inverts only 8-bit pictures
    picture = _upright(picture)
    if largest is not None:
        values = largest - np.asarray(picture) if white_is_zero else np.asarray(picture)
        return np.rint(values * np.float32(65535 / largest)).astype(np.uint16)[:, :, None]
    picture = picture.convert("LA") if picture.mode == "La" else picture  # the only conversion that Pillow supports
    mode = "RGBA" if _has_alpha(picture) else "L" if picture.mode in ("1", "L") else "RGB"
    return np.asarray(picture.convert(mode)).reshape(picture.height, picture.width, -1)


def with_picture(source: str | Path | IO[bytes], use: Callable[["Image"], Result]) -> Result:
    """Open the picture in a file, call `use` on it and return the result.

    Raises:
        TooLargeError: It has more than `MOST_PIXELS`; this is checked before decoding.
        ValueError: It cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, str | Path):  # a file opened by Pillow is mapped, and a rotated TIFF is then wrong
        try:
            with open(source, "rb") as file:
                return with_picture(file, use)
        except OSError as error:
            raise ValueError(str(error)) from error
    try:
        picture = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLargeError(str(error)) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot identify it as one of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise many types for damaged files
        raise ValueError(str(error)[:200] or type(error).__name__) from error
    with picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise TooLargeError(f"{picture.width} x {picture.height} pixels are more than {MOST_PIXELS}")
        try:
            picture.load()
        except Exception as error:  # decoders raise many types for damaged files
            raise ValueError(str(error)[:200] or type(error).__name__) from error
        return use(picture)


def _largest_value(picture: "Image") -> int | None:
    """Return the value of a white pixel where pixels have more than 8 bits; else None.

    Raises:
        UnknownRangeError: The value of white is not known.
    """
    if picture.mode.startswith("I;16"):
        bits = _tiff_tag(picture, _BITS) or (16,)
        return int((1 << bits[0]) - 1)
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):  # Pillow scales a PPM to 16 bits
        return 65535
    if picture.mode == "I":
        raise UnknownRangeError("integer pixels whose range is not known (mode I, 32 bits)")
    if picture.mode == "F":
        pixels = np.asarray(picture)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # False for NaN
            raise UnknownRangeError(
                f"floating pixels from {pixels.min():g} to {pixels.max():g} (mode F), where only the range 0 to 1 is "
                "supported"
            )
        return 1
    return None


def _tiff_tag(picture: "Image", number: int) -> Any:
    """Return a tag of a TIFF, or None if the picture is no TIFF or has no such tag."""
    tags = getattr(picture, "tag_v2", None)
    return None if tags is None else tags.get(number)


def _upright(picture: "Image") -> "Image":
    """Rotate the picture as its EXIF orientation says; Pillow already does so for a TIFF."""
    from PIL import ImageOps

    if picture.format == "TIFF":
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF data do not affect the pixels; readers raise many types
        return picture


def _has_alpha(picture: "Image") -> bool:
    palette = picture.palette.mode if picture.mode == "P" and picture.palette is not None else ""
    return picture.mode in _ALPHA_MODES or "transparency" in picture.info or palette.endswith("A")
