"""A picture becomes the same model input from every file format, in evaluation, calibration and serving."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData, open_data
from rsi_deploy.runtime.feeds.inputs import InputSpec
from rsi_deploy.serving.protocol.images import image_request
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.signature import Signature

HEIGHT, WIDTH = 24, 16
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
GRAY = np.rint(255 * (2 * Y + X) / (2 * HEIGHT + WIDTH - 3)).astype(np.uint8)  # no symmetry, all of the range
COLOUR = np.stack([GRAY, 255 - GRAY, GRAY[::-1]], axis=2)
WIDE = GRAY.astype(np.uint16) * 257
STEPS = Preprocessing()
LEVEL = 1 / 255


def spec(channels=1, layout="NCHW", dtype=np.float32, size=(HEIGHT, WIDTH)):
    shape = ("N", channels, *size) if layout == "NCHW" else ("N", *size, channels)
    return InputSpec(name="x", dtype=np.dtype(dtype), shape=shape)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(samples, bits, colour_type, *chunks):
    """Return a PNG file; samples `(H, bytes of a row)` are stored as they are."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", WIDTH, len(samples), bits, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    body = b"".join(chunk(name, content) for name, content in chunks) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def tiff(pixels, bits, photometric=1, sample_format=1):
    """Return a TIFF file of one gray strip; photometric 0 is "white is zero", sample_format 2 signed, 3 float."""
    content = pixels.tobytes()
    tags = [(256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, HEIGHT)]
    tags += [(279, len(content)), (339, sample_format)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    place = 8 + len(content) + len(content) % 2
    body = content + b"\0" * (len(content) % 2) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", place) + body


def packed_12_bit(values):
    """Return 12-bit numbers packed as pairs in three bytes."""
    first, second = values.reshape(-1, 2).astype(np.uint32).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8)


def gray_palette():
    image = Image.fromarray(255 - GRAY).copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([255 - number // 3 for number in range(768)])
    return image


def cmyk(rgb):
    return Image.fromarray(rgb).convert("CMYK")


RGB_OF_GRAY = np.repeat(GRAY[:, :, None], 3, axis=2)
L, RGB = Image.fromarray(GRAY), Image.fromarray(RGB_OF_GRAY)
BIG = WIDE.astype(">u2")
# name -> suffix, file of the gray scene, tolerance in levels of 255
GRAY_FILES = {
    "8 bit PNG": ("png", saved(L, "PNG"), 0),
    "16 bit PNG": ("png", saved(Image.fromarray(WIDE), "PNG"), 0),
    "4 bit PNG": ("png", png((GRAY[:, ::2] & 0xF0) | (GRAY[:, 1::2] >> 4), 4, 0), 16),
    "16 bit gray with alpha": ("png", png(np.stack([BIG, BIG // 2], axis=2), 16, 4), 1),
    "16 bit RGB": ("png", png(np.stack([BIG] * 3, axis=2), 16, 2), 1),
    "gray with alpha": ("png", saved(Image.merge("LA", (L, L)), "PNG"), 0),
    "gray with a transparent level": ("png", saved(L, "PNG", transparency=7), 0),
    "palette": ("png", saved(gray_palette(), "PNG"), 0),
    "palette with transparency": ("png", saved(gray_palette(), "PNG", transparency=bytes(range(256))), 0),
    "RGBA": ("png", saved(Image.merge("RGBA", (L, L, L, L.rotate(180))), "PNG"), 0),
    "16 bit PGM": ("ppm", b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + BIG.tobytes(), 0),
    "12 bit PGM": ("ppm", b"P5 %d %d 4095\n" % (WIDTH, HEIGHT) + (BIG >> 4).astype(">u2").tobytes(), 0.1),
    "16 bit TIFF": ("tif", tiff(WIDE, 16), 0),
    "16 bit TIFF, the other way round": ("tif", saved(Image.frombytes("I;16B", L.size, BIG.tobytes()), "TIFF"), 0),
    "16 bit TIFF, white is zero": ("tif", tiff(65535 - WIDE, 16, photometric=0), 0),
    "12 bit TIFF": ("tif", tiff(packed_12_bit(WIDE >> 4), 12), 0.1),
    "8 bit TIFF, white is zero": ("tif", tiff(255 - GRAY, 8, photometric=0), 0),
    "float TIFF": ("tif", tiff((GRAY / 255).astype(np.float32), 32, sample_format=3), 0),
    "float TIFF, white is zero": ("tiff", tiff((1 - GRAY / 255).astype(np.float32), 32, 0, 3), 0.01),
    "CMYK TIFF": ("tif", saved(cmyk(RGB_OF_GRAY), "TIFF"), 0),
    "CMYK JPEG": ("jpg", saved(cmyk(RGB_OF_GRAY), "JPEG", quality=100), 4),
    "YCbCr TIFF": ("tif", saved(RGB.convert("YCbCr"), "TIFF"), 1),
    "Lab TIFF": ("tif", saved(RGB.convert("LAB"), "TIFF"), 3),
    "gray JPEG": ("jpeg", saved(L, "JPEG", quality=100), 3),
    "BMP": ("bmp", saved(L, "BMP"), 0),
    "GIF of two frames": ("gif", saved(L, "GIF", save_all=True, append_images=[L.rotate(180)]), 0),
    "TIFF of two pages": ("tif", saved(L, "TIFF", save_all=True, append_images=[L.rotate(180)]), 0),
    "lossless WebP": ("webp", saved(RGB, "WEBP", lossless=True), 0),
}


def evaluated(folder, file, takes, steps=STEPS):
    """Return the input that `eval` makes from the file."""
    (folder / "t" / "c").mkdir(parents=True, exist_ok=True)
    suffix, content = file
    (folder / "t" / "c" / f"a.{suffix}").write_bytes(content)
    ((feeds, _),) = Feeding(open_data(folder / "t"), [takes], steps).batches(4)
    return feeds["x"][0]


def three_ways(folder, file, takes, steps=STEPS):
    """Return the inputs that `eval`, `--calib` and the server's /image make from the file."""
    came = evaluated(folder, file, takes, steps)
    (calibrated,) = CalibrationData(str(folder / "t"), [takes], steps, 4).feeds()
    request = image_request(file[1], steps, Signature(inputs=(takes,), outputs=()), "m")
    return came, calibrated["x"][0], request.feeds["x"][0]


def off(came, scene):
    """Return the largest difference from a scene `(H, W, C)` of 0 to 255, in levels."""
    return float(np.abs(np.moveaxis(came, 0, 2) * 255 - scene).max())


@pytest.mark.parametrize("name", GRAY_FILES)
def test_a_gray_scene_is_the_same_input_in_every_file(tmp_path, name):
    suffix, content, levels = GRAY_FILES[name]
    for channels in (1, 3):
        scene = np.repeat(GRAY[:, :, None], channels, axis=2)
        for came in three_ways(tmp_path, (suffix, content), spec(channels)):
            assert off(came, scene) <= levels + 0.01
    clipped, high_byte_of_12_bits = np.clip(WIDE, 0, 255), (WIDE >> 4) >> 8
    for wrong in (clipped, high_byte_of_12_bits):
        assert off(wrong[None] / 255, GRAY[:, :, None]) > 200, "neither would be taken"


def test_black_and_white(tmp_path):
    scene = np.where(GRAY > 100, 255, 0)[:, :, None]
    image = Image.fromarray(GRAY).point(lambda value: 255 * (value > 100), "1")
    for kind in ("PNG", "TIFF", "BMP"):
        for came in three_ways(tmp_path / kind, (kind[:3].lower(), saved(image, kind)), spec(1)):
            assert off(came, scene) == 0


COLOUR_FILES = {
    "RGB": ("png", saved(Image.fromarray(COLOUR), "PNG"), 0),
    "RGBA": ("png", saved(Image.fromarray(np.dstack([COLOUR, GRAY])), "PNG"), 0),
    "16 bit RGB": ("png", png(COLOUR.astype(">u2") * 257, 16, 2), 1),
    "CMYK": ("tif", saved(cmyk(COLOUR), "TIFF"), 0),
    "Lab": ("tif", saved(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), 45),
    "WebP": ("webp", saved(Image.fromarray(COLOUR), "WEBP", lossless=True), 0),
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", COLOUR_FILES)
def test_colours_go_to_the_channels_of_the_model(tmp_path, name, layout):
    suffix, content, levels = COLOUR_FILES[name]
    steps = Preprocessing(layout=layout)
    gray = np.asarray(Image.fromarray(COLOUR).convert("L"))[:, :, None]
    alpha = GRAY if name == "RGBA" else np.full_like(GRAY, 255)
    for channels, scene in ((1, gray), (3, COLOUR), (4, np.dstack([COLOUR, alpha]))):
        for came in three_ways(tmp_path, (suffix, content), spec(channels, layout), steps):
            assert came.shape == (scene.shape if layout == "NHWC" else scene.transpose(2, 0, 1).shape)
            assert off(came if layout == "NCHW" else came.transpose(2, 0, 1), scene) <= levels + 0.01
    assert off(COLOUR[:, :, ::-1].transpose(2, 0, 1) / 255, COLOUR) > 100, "channels in another order are not taken"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_applied(tmp_path, kind):
    upright = RGB if kind == "WEBP" else L
    stored = {1: upright, 2: upright.transpose(0), 3: upright.transpose(3), 4: upright.transpose(1)}
    stored |= {5: upright.transpose(5), 6: upright.transpose(2), 7: upright.transpose(6), 8: upright.transpose(4)}
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        file = (kind.lower(), saved(image, kind, exif=exif, **options))
        for came in three_ways(tmp_path / str(orientation), file, spec(1)):
            assert off(came, GRAY[:, :, None]) <= 3
    as_stored = GRAY[::-1, ::-1][None] / 255
    assert off(as_stored, GRAY[:, :, None]) > 200, "a picture upside down is not taken"


def test_a_picture_of_16_bits_is_rotated(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(WIDE)))
    for kind in ("PNG", "TIFF"):
        for came in three_ways(tmp_path / kind, (kind.lower(), saved(turned, kind, exif=exif)), spec(1)):
            assert off(came, GRAY[:, :, None]) < 0.01


def test_damaged_exif_is_ignored(tmp_path):
    for came in three_ways(tmp_path, ("png", saved(L, "PNG", exif=b"Exif\0\0II*\0\xff\xff")), spec(1)):
        assert off(came, GRAY[:, :, None]) <= 3


RAMP = GRAY.astype(np.float32)
UNKNOWN = {
    "32 bit integers": (tiff(RAMP.astype(np.int32), 32), "integer pixels"),
    "signed 32 bit integers": (tiff(RAMP.astype(np.int32) - 9, 32, sample_format=2), "integer pixels"),
    "signed 16 bit integers": (tiff(RAMP.astype(np.int16), 16, sample_format=2), "integer pixels"),
    "floats to 255": (tiff(RAMP, 32, sample_format=3), "from 0 to 255"),
    "negative floats": (tiff(RAMP / 255 - 0.5, 32, sample_format=3), "from -0.5 to 0.5"),
    "NaN": (tiff(np.where(RAMP == 0, np.nan, RAMP / 255).astype(np.float32), 32, sample_format=3), "from nan"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_pixels_of_unknown_range_are_refused(tmp_path, name):
    content, words = UNKNOWN[name]
    with pytest.raises(UsageError, match=rf"a\.tif has .*{words}.*; store it with 8 or 16 bits"):
        evaluated(tmp_path, ("tif", content), spec(1))
    with pytest.raises(UsageError, match=rf"a\.tif has .*{words}"):
        CalibrationData(str(tmp_path / "t"), [spec(1)], STEPS, 4)
    with pytest.raises(Refusal, match=rf"{words}.*8 or 16 bits") as refused:
        image_request(content, STEPS, Signature(inputs=(spec(1),), outputs=()), "m")
    assert refused.value.status == 400


def test_16_bits_are_not_rounded_to_8(tmp_path):
    fine = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) + 30000
    for came in three_ways(tmp_path, ("png", saved(Image.fromarray(fine), "PNG")), spec(1)):
        assert (np.diff(came.ravel()) > 0).all()
        np.testing.assert_allclose(came[0], fine / 65535, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_16_bits_are_resized_like_8_bits(tmp_path, interpolation):
    steps = Preprocessing(resize=(11, 19), crop=(9, 12), interpolation=interpolation)
    takes = spec(3, size=(9, 12))
    few = three_ways(tmp_path / "8", ("png", saved(L, "PNG")), takes, steps)
    many = three_ways(tmp_path / "16", ("png", saved(Image.fromarray(WIDE), "PNG")), takes, steps)
    for eight, sixteen in zip(few, many, strict=True):
        np.testing.assert_allclose(sixteen, eight, atol=LEVEL)
    other = Preprocessing(resize=(12, 19), crop=(9, 12), interpolation=interpolation)
    assert np.abs(evaluated(tmp_path / "8", ("png", saved(L, "PNG")), takes, other) - few[0]).max() > LEVEL


def test_arrays_are_read_like_files():
    takes = spec(3)
    for images, scene in ((GRAY[None], RGB_OF_GRAY), (GRAY[None, ..., None], RGB_OF_GRAY), (COLOUR[None], COLOUR)):
        for many in (images, images.astype(np.uint16) * 257):
            ((feeds, _),) = Feeding(ArrayData(many), [takes], STEPS).batches(4)
            assert off(feeds["x"][0], scene) < 0.01
    codes = np.arange(2 * 4 * 6, dtype=np.uint16).reshape(2, 4, 6)  # three axes, but a model of integers
    takes = InputSpec(name="x", dtype=np.dtype(np.int64), shape=("N", 4, "T"))
    ((feeds, _),) = Feeding(ArrayData(codes), [takes], None).batches(4)
    np.testing.assert_array_equal(feeds["x"], codes)


def test_pictures_of_several_kinds_in_one_table(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
    pq = pytest.importorskip("pyarrow.parquet")
    names = ("8 bit PNG", "16 bit PNG", "palette", "RGBA", "CMYK TIFF", "float TIFF")
    images = [{"bytes": GRAY_FILES[name][1], "path": name} for name in names]
    pq.write_table(pa.table({"image": images, "label": [0] * len(names)}), tmp_path / "t.parquet")
    for channels in (1, 3):
        ((feeds, _),) = Feeding(open_data(tmp_path / "t.parquet"), [spec(channels)], STEPS).batches(8)
        for came in feeds["x"]:
            assert off(came, GRAY[:, :, None]) < 0.01


@pytest.mark.parametrize(
    ("takes", "expected"),
    [
        (spec(1, "NHWC", np.uint8), GRAY[:, :, None]),
        (spec(3, "NHWC", np.uint8), RGB_OF_GRAY),
        (spec(3, "NCHW", np.uint8), RGB_OF_GRAY.transpose(2, 0, 1)),
        (spec(1, "NHWC", np.uint16), WIDE[:, :, None]),
        (InputSpec(name="x", dtype=np.dtype(np.uint8), shape=("N", HEIGHT, WIDTH)), GRAY),
    ],
)
def test_a_model_of_integers_gets_pictures_on_its_own_scale(tmp_path, takes, expected):
    for name in ("8 bit PNG", "16 bit PNG", "palette", "RGBA"):
        came = evaluated(tmp_path / name, GRAY_FILES[name][:2], takes, None)
        np.testing.assert_array_equal(came, expected)


def test_a_model_of_gray_pictures_without_a_channel_axis(tmp_path):
    takes = InputSpec(name="x", dtype=np.dtype(np.float32), shape=("N", HEIGHT, WIDTH))
    for layout in ("NCHW", "NHWC"):
        for came in three_ways(tmp_path, ("png", saved(RGB, "PNG")), takes, Preprocessing(layout=layout)):
            np.testing.assert_allclose(came, GRAY / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("takes", "words"),
    [
        (spec(2), "2 channels at axis 1"),
        (spec(5), "5 channels at axis 1"),
        (spec(3, "NHWC"), "add --layout NHWC"),
    ],
)
def test_other_numbers_of_channels_are_refused(tmp_path, takes, words):
    file = ("png", saved(RGB, "PNG"))
    with pytest.raises(UsageError, match=rf"--data: the model takes x: .*{words}"):
        evaluated(tmp_path, file, takes)
    with pytest.raises(UsageError, match=rf"--calib: the model takes x: .*{words}"):
        CalibrationData(str(tmp_path / "t"), [takes], STEPS, 4)
    with pytest.raises(Refusal, match=words):
        image_request(file[1], STEPS, Signature(inputs=(takes,), outputs=()), "m")


def test_one_image_of_16_bits():
    np.testing.assert_allclose(STEPS.apply_image(Image.fromarray(WIDE))[0], GRAY / 255, atol=1e-6)
    with pytest.raises(UsageError, match="integer pixels"):
        STEPS.apply_image(Image.fromarray(GRAY.astype(np.int32)))


def junk(folder):
    """Write the files that operating systems add to a folder."""
    for name in ("cat/._a.png", "__MACOSX/cat/._a.png", "cat/__MACOSX/a.png", ".git/a.png", "cat/.thumbs/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    for name in ("Thumbs.db", ".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "@eaDir/cat/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0" * 8)


def test_system_files_are_no_data(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        L.save(tmp_path / name / "a.png")
    before = open_data(tmp_path)
    junk(tmp_path)
    after = open_data(tmp_path)
    assert (after.classes, len(after), after.fingerprint()) == (("cat", "dog"), 2, before.fingerprint())
    next(after.batches(4, STEPS))
    L.save(tmp_path / "dog" / "b.png")
    assert open_data(tmp_path).fingerprint() != before.fingerprint(), "a picture more is other data"


def test_system_files_in_a_table_and_an_archive_are_no_data(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": [[1.0, 2.0]] * 3, "label": [0, 1, 0]}), tmp_path / "test-00000-of-00001.parquet")
    (tmp_path / "._test-00000-of-00001.parquet").write_bytes(b"junk")
    assert len(open_data(tmp_path)) == 3
    np.savez(tmp_path / "a.npz", images=GRAY[None], labels=np.zeros(1, int))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("__MACOSX/._images.npy", b"junk")
        archive.writestr(".DS_Store", b"junk")
    assert open_data(tmp_path / "a.npz").columns == ("images",)
