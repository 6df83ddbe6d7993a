import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification, SemanticSegmentation

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Gradients, edges and grain, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(25 * x * y)], axis=2) * 200
    smooth[height // 4 : height // 2, width // 4 : width // 2] = (250, 10, 90)
    grain = np.random.default_rng(seed).normal(0, 12, smooth.shape)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


def worst_in_levels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference before normalization, as a share of one 8-bit level."""
    return float(np.abs((ours - theirs) * np.asarray(STD)[:, None, None]).max() * 255)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [((97, 131), 64, 56), ((131, 97), 80, 33), ((40, 50), 60, 60), ((50, 40), 30, 48), ((64, 64), 64, 63)],
)
def test_is_torchvisions_image_classification(interpolation, size, resize, crop):
    transform = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode(interpolation))
    ours = Preprocessing.from_torchvision(transform)
    image = Image.fromarray(picture(*size))
    theirs = transform(image).numpy()
    assert ours.apply_image(image).shape == theirs.shape == (3, crop, crop)
    assert worst_in_levels(ours.apply_image(image), theirs) <= 1
    np.testing.assert_array_equal(ours.apply(picture(*size)[None])[0], ours.apply_image(image))
    other = "nearest" if interpolation != "nearest" else "bilinear"
    wrong = ours.model_copy(update={"interpolation": other})
    if resize != min(size):  # else nothing is resized, and the filter makes no difference
        assert worst_in_levels(wrong.apply_image(image), theirs) > 1


def test_the_comparison_sees_a_crop_that_is_one_pixel_off():
    transform = ImageClassification(crop_size=31, resize_size=64)
    image = picture(64, 64)
    theirs = transform(Image.fromarray(image)).numpy()
    ours = Preprocessing.from_torchvision(transform)
    assert worst_in_levels(ours.apply(image[None])[0], theirs) <= 1
    assert worst_in_levels(ours.apply(np.roll(image, 1, axis=0)[None])[0], theirs) > 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_layouts_hold_the_same_numbers(channels):
    images = np.repeat(picture(20, 30)[None, :, :, :1], channels, axis=3)
    steps = Preprocessing(resize=(12, 10), mean=(0.5,), std=(0.25,))
    nchw, nhwc = steps.apply(images), steps.model_copy(update={"layout": "NHWC"}).apply(images)
    assert nchw.shape == (1, channels, 12, 10)
    np.testing.assert_array_equal(nchw, nhwc.transpose(0, 3, 1, 2))
    assert nchw.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_and_dtype(dtype):
    result = Preprocessing(dtype=dtype).apply(np.full((1, 2, 2, 1), 51, np.uint8))
    assert result.dtype == dtype
    np.testing.assert_allclose(result, 0.2, rtol=1e-3 if dtype == "float16" else 1e-7)


def test_a_palette_image_becomes_rgb():
    image = Image.fromarray(picture(10, 12)).quantize(8)
    assert Preprocessing().apply_image(image).shape == (3, 10, 12)


def test_metadata_keeps_everything_in_a_fixed_order():
    steps = Preprocessing(resize=256, crop=(224, 200), mean=MEAN, std=STD, interpolation="bicubic", layout="NHWC")
    assert Preprocessing.from_metadata(steps.to_metadata()) == steps
    assert Preprocessing.from_metadata(steps.model_copy(update={"resize": 255}).to_metadata()) != steps
    reordered = Preprocessing(std=STD, mean=MEAN, layout="NHWC", interpolation="bicubic", crop=(224, 200), resize=256)
    assert reordered.to_metadata() == steps.to_metadata()
    assert " " not in steps.to_metadata()


def test_description_names_every_step():
    text = Preprocessing(resize=256, crop=(224, 200), mean=MEAN, std=STD).describe()
    for part in ("256", "bilinear", "224 x 200", "255", "0.485", "0.225", "float32", "NCHW"):
        assert part in text
    assert "crop" not in Preprocessing().describe()
    assert "255" not in Preprocessing(scale=1.0).describe()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mean": (0.5,)}, "mean has 1 values and std has 0"),
        ({"mean": (0.5,), "std": (0.0,)}, r"std divides.*\(0\.0,\)"),
        ({"resize": 0}, "resize=0"),
        ({"crop": (4, -1)}, r"crop=\(4, -1\)"),
        ({"scale": float("nan")}, "finite"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(UsageError, match=named):
        Preprocessing(**settings)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\)"),
        (np.zeros((1, 4, 4, 1), np.uint8), "3 values, but the images have 1 channels"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, named):
    with pytest.raises(UsageError, match=named):
        Preprocessing(mean=MEAN, std=STD).apply(images)


def test_two_channels_cannot_be_resized():
    with pytest.raises(UsageError, match="got 2"):
        Preprocessing(resize=4).apply(np.zeros((1, 8, 8, 2), np.uint8))


@pytest.mark.parametrize("text", ["{", '{"resize": "big"}', '{"colour": 1}'])
def test_foreign_metadata_is_refused(text):
    with pytest.raises(UsageError, match=r"rsi_deploy\.preprocessing"):
        Preprocessing.from_metadata(text)


def test_foreign_transforms_are_refused():
    with pytest.raises(UsageError, match=r"SemanticSegmentation has no crop_size"):
        Preprocessing.from_torchvision(SemanticSegmentation(resize_size=4))
    lanczos = ImageClassification(crop_size=4, interpolation=InterpolationMode.LANCZOS)
    with pytest.raises(UsageError, match="'lanczos'"):
        Preprocessing.from_torchvision(lanczos)
