"""Pictures from anywhere: a few formats, decoded only where they are of a size that a picture has."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import read_image
from rsi_deploy.data.preprocess import MOST_SIDE, Preprocessing
from rsi_deploy.io.pictures import FORMATS, MOST_PIXELS, TooLargeError, with_picture


def encoded(kind, size=(5, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def png_that_claims(width, height):
    """A PNG of a hundred bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_are_read(kind):
    assert with_picture(io.BytesIO(encoded(kind)), lambda picture: picture.convert("RGB").size) == (5, 4)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA"])
def test_others_are_not(kind):
    """Pillow decodes EPS by running Ghostscript."""
    with pytest.raises(ValueError, match="cannot identify"):
        with_picture(io.BytesIO(encoded(kind)), lambda picture: picture.load())


@pytest.mark.parametrize(("width", "height"), [(7_100, 7_100), (50_000, 50_000), (1 << 30, 1 << 30)])
def test_a_picture_that_claims_too_much_is_not_decoded(width, height):
    content = png_that_claims(width, height)
    assert len(content) < 200
    with pytest.raises(TooLargeError, match="pixels"):
        with_picture(io.BytesIO(content), lambda picture: pytest.fail("it was decoded"))
    with pytest.raises(UsageError, match="cannot be read as an image"):
        read_image(io.BytesIO(content), "a.png")
    assert width * height > MOST_PIXELS


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture(kind):
    content = encoded(kind, (64, 64))
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(50):
        damaged = bytearray(content[: random.integers(1, len(content))])
        damaged[random.integers(len(damaged))] ^= 1 << random.integers(8)
        try:
            picture = read_image(io.BytesIO(bytes(damaged)), "a")
        except UsageError:  # nothing else may be raised
            refused += 1
        else:
            assert picture.ndim == 3
    assert refused > 10


def test_a_preprocessing_that_asks_for_too_much():
    for sizes in ({"resize": 1 << 40}, {"crop": (1 << 40, 1)}, {"resize": (MOST_SIDE + 1, 8)}):
        with pytest.raises(UsageError, match=f"sizes are 1 to {MOST_SIDE} pixels"):
            Preprocessing(**sizes)
    line = np.zeros((1, 1, 10_000, 3), np.uint8)
    with pytest.raises(UsageError, match="an image of 1 x 10000 would become 7000 x 70000000"):
        Preprocessing(resize=MOST_SIDE).apply(line)
