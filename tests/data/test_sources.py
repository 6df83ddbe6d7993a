import numpy as np
import pytest
from PIL import Image

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import open_data

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(10, dtype=np.uint8) // 2


@pytest.fixture
def npz(tmp_path):
    def write(name="data.npz", **arrays):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


@pytest.fixture
def tree(tmp_path):
    """Two classes, three images; `zebra` holds images of two modes, one of them in a folder of its own."""
    root = tmp_path / "tree"
    for name, seed in (("zebra/b.png", 1), ("zebra/deep/c.png", 2), ("ant/a.png", 0)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[seed]).save(root / name)
    (root / "ant" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    return root


def read(dataset, batch_size=4, preprocessing=None, limit=None):
    batches = list(dataset.batches(batch_size, preprocessing, limit))
    labels = None if batches[0][1] is None else np.concatenate([labels for _, labels in batches])
    return np.concatenate([inputs for inputs, _ in batches]), labels, [len(inputs) for inputs, _ in batches]


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("x", "labels")])
def test_npz_batches_are_all_samples_in_order(npz, keys):
    dataset = open_data(npz(**{keys[0]: IMAGES, keys[1]: LABELS, "names": np.arange(10)}))
    inputs, labels, sizes = read(dataset)
    assert (len(dataset), dataset.kind, sizes) == (10, "images", [4, 4, 2])
    np.testing.assert_array_equal(inputs, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    assert labels.dtype == np.int64


def test_pictures_go_through_the_preprocessing_and_arrays_do_not(npz):
    steps = Preprocessing(crop=(4, 4))
    pictures, _, _ = read(open_data(npz(images=IMAGES)), preprocessing=steps)
    np.testing.assert_array_equal(pictures, steps.apply(IMAGES))
    ready = IMAGES.astype(np.float32)
    dataset = open_data(npz(x=ready))
    assert dataset.kind == "inputs"
    assert dataset.labels is None
    np.testing.assert_array_equal(read(dataset, preprocessing=steps)[0], ready)


def test_grey_pictures_get_a_channel(npz):
    assert read(open_data(npz(images=IMAGES[..., 0])))[0].shape == (10, 6, 5, 1)


def test_a_limit_reaches_every_class_of_sorted_data(npz):
    dataset = open_data(npz(images=IMAGES, labels=LABELS))
    inputs, labels, sizes = read(dataset, limit=5)
    assert sizes == [4, 1]
    np.testing.assert_array_equal(labels, np.arange(5))
    np.testing.assert_array_equal(inputs, IMAGES[::2])
    assert len(read(dataset, limit=99)[0]) == 10


def test_fingerprint_depends_only_on_content(npz, tmp_path):
    first = open_data(npz(images=IMAGES, labels=LABELS)).fingerprint()
    np.savez_compressed(tmp_path / "z.npz", x=IMAGES, y=LABELS)
    assert open_data(tmp_path / "z.npz").fingerprint() == first
    other = IMAGES.copy()
    other[9, 5, 4, 2] ^= 1
    assert open_data(npz(images=other, labels=LABELS)).fingerprint() != first
    assert open_data(npz(images=IMAGES, labels=LABELS[::-1])).fingerprint() != first
    assert open_data(npz(images=IMAGES.reshape(10, 5, 6, 3), labels=LABELS)).fingerprint() != first


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"labels": LABELS}, "holds nothing; expected images"),
        ({"x": IMAGES, "images": IMAGES}, "holds x, images; expected"),
        ({"images": IMAGES, "labels": LABELS[:9]}, "10 inputs but 9 labels"),
        ({"images": IMAGES, "labels": LABELS * 1.0}, "integers.*float64"),
        ({"images": IMAGES, "labels": np.eye(10, dtype=int)}, r"\(10, 10\)"),
        ({"images": IMAGES[:0]}, r"no samples.*\(0, 6, 5, 3\)"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"channels.*\(10, 3, 6, 5\)"),
        ({"x": np.array([1 + 2j])}, "must be numbers"),
        ({"x": np.array([{}, []], dtype=object)}, "allow_pickle|[Oo]bject"),
    ],
)
def test_npz_files_that_do_not_fit_say_why(npz, arrays, named):
    path = npz(**arrays)
    with pytest.raises(UsageError, match=named) as caught:
        open_data(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_data_are_named(tmp_path):
    for name, content in (("none.npz", None), ("text.npz", b"hello"), ("data.csv", b"1,2")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=name):
            open_data(tmp_path / name)


def test_a_damaged_archive_is_named(npz):
    path = npz(images=IMAGES)
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)  # inside the array: the checksum no longer holds
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.npz cannot be read"):
        open_data(path)


def test_batch_size_and_limit_start_at_one(npz):
    dataset = open_data(npz(images=IMAGES))
    for batch_size, limit in ((0, None), (4, 0)):
        with pytest.raises(UsageError, match=f"{batch_size} and {limit}"):
            list(dataset.batches(batch_size, None, limit))


def test_folder_tree(tree):
    dataset = open_data(tree)
    inputs, labels, sizes = read(dataset, batch_size=2)
    assert (len(dataset), dataset.kind, dataset.classes, sizes) == (3, "images", ("ant", "zebra"), [2, 1])
    np.testing.assert_array_equal(inputs, IMAGES[:3])
    np.testing.assert_array_equal(labels, [0, 1, 1])
    steps = Preprocessing(crop=(4, 4))
    np.testing.assert_array_equal(read(dataset, preprocessing=steps)[0], steps.apply(IMAGES[:3]))


def test_a_class_list_sets_the_numbers(tree):
    assert open_data(tree, classes=["zebra", "ant"]).labels.tolist() == [0, 0, 1]
    part = open_data(tree, classes=["zebra", "newt", "ant"])
    assert (part.labels.tolist(), part.classes) == ([0, 0, 2], ("zebra", "newt", "ant")), "newt has no folder here"
    for classes, named in (
        (["zebra"], "ant"),
        (["ant", "ant", "zebra"], "twice.*ant"),
    ):
        with pytest.raises(UsageError, match=named):
            open_data(tree, classes=classes)


def test_folder_fingerprint_sees_content_and_class(tree):
    first = open_data(tree).fingerprint()
    assert open_data(tree).fingerprint() == first
    assert open_data(tree, classes=["zebra", "ant"]).fingerprint() != first
    (tree / "zebra" / "b.png").rename(tree / "ant" / "b.png")
    assert open_data(tree).fingerprint() != first
    (tree / "ant" / "b.png").rename(tree / "zebra" / "b.png")
    assert open_data(tree).fingerprint() == first
    Image.fromarray(IMAGES[5]).save(tree / "ant" / "a.png")
    assert open_data(tree).fingerprint() != first


def test_a_corrupt_image_is_named(tree):
    whole = (tree / "zebra" / "b.png").read_bytes()
    for content in (b"not a picture", whole[: len(whole) // 2]):
        (tree / "zebra" / "b.png").write_bytes(content)
        with pytest.raises(UsageError, match=r"b\.png cannot be read as an image"):
            read(open_data(tree))


def test_images_of_two_sizes_need_a_resize(tree):
    Image.fromarray(IMAGES[3][:4]).save(tree / "zebra" / "b.png")
    with pytest.raises(UsageError, match=r"b\.png.*\(4, 5, 3\).*\(6, 5, 3\)"):
        read(open_data(tree))
    assert read(open_data(tree), preprocessing=Preprocessing(resize=(5, 5)))[0].shape == (3, 3, 5, 5)


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no class folders"):
        open_data(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="no images"):
        open_data(tmp_path)


def test_pictures_in_folders_have_no_columns(tree):
    with pytest.raises(UsageError, match=r"tree has pictures for one input, but the model takes ids, mask; give an"):
        open_data(tree).select(["ids", "mask"])
