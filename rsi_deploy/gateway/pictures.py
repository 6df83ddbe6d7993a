"""Pictures from anywhere: a few formats, whose decoders run no other program, and no more pixels than a photograph."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names; it reads more, some of them by calling Ghostscript."""

MOST_PIXELS = 50_000_000

Result = TypeVar("Result")


class TooLargeError(ValueError):
    """A picture of more than `MOST_PIXELS`."""


def with_picture(source: str | Path | IO[bytes], use: Callable[["Image"], Result]) -> Result:
    """What `use` makes of the picture in a file.

    Raises:
        TooLargeError: more than `MOST_PIXELS`; found before anything is decoded.
        ValueError: it is no picture that can be read.
    """
    from PIL import Image

    try:
        picture = Image.open(source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise TooLargeError(str(error)) from error
    except Exception as error:  # decoders raise many kinds on damaged files
        raise ValueError(str(error)[:200] or type(error).__name__) from error
    with picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise TooLargeError(f"{picture.width} x {picture.height} pixels are more than {MOST_PIXELS}")
        try:
            picture.load()
        except Exception as error:  # as above
            raise ValueError(str(error)[:200] or type(error).__name__) from error
        return use(picture)
