"""Calibration and evaluation data on disk, read as batches: an `.npz` file or a tree of class folders.

One rule decides which arrays are pictures: **uint8 with the shape `(N, H, W)` or `(N, H, W, C)`, C one of
1, 3, 4, is pictures** and goes through the preprocessing; every other numeric array is taken as ready model
input and passed on untouched. The `.npz` keys are `images` (or `x`) and, where there are labels, `labels`
(or `y`).
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rsi_deploy.errors import UsageError
from rsi_deploy.measure.preprocess import Preprocessing

Batch = tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Dataset(Protocol):
    """What calibration and evaluation read; `labels` is int64 `(N,)`, or None where there are none."""

    @property
    def kind(self) -> Literal["images", "inputs"]:
        """`images`: 8-bit pictures that go through a preprocessing. `inputs`: ready model inputs."""

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class numbers int64 `(N,)`."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """The sha256 (hex) of the content (arrays, or paths and images), not of file times or compression."""

    def batches(
        self, batch_size: int, preprocessing: Preprocessing | None, limit: int | None = None
    ) -> Iterator[Batch]:
        """Walk the samples in order, `batch_size` at a time; the last batch may be smaller.

        Args:
            batch_size: samples a batch, at least 1.
            preprocessing: applied to pictures; None gives them as uint8 `(n, H, W, C)`.
                Ready inputs pass by it.
            limit: read at most so many samples, evenly spaced over the whole set: data are often sorted by
                class, and the first thousand would be one class.

        Yields:
            `(inputs (n, ...), labels int64 (n,) or None)`.

        Raises:
            UsageError: a batch size or limit below 1, an unreadable image, images that end up in different
                shapes.
        """


def open_data(path: str | Path, classes: Sequence[str] | None = None) -> Dataset:
    """Open an `.npz` file or a folder of class folders.

    Args:
        path: the file or folder.
        classes: for a folder tree, the class folders in label order; without it they are sorted by name.

    Raises:
        UsageError: nothing there, an unknown format, unknown keys, labels that do not fit, no samples.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFolderData(path, classes)
    if not path.exists():
        raise UsageError(f"data: {path} does not exist; expected an .npz file or a folder of class folders")
    if path.suffix.lower() != ".npz":
        raise UsageError(f"data: {path} is neither an .npz file nor a folder of class folders")
    if classes is not None:
        raise UsageError(f"data: {path} carries class numbers already; a class list is for folder trees alone")
    return ArrayData.from_npz(path)


class ArrayData:
    """Samples in memory, `values (N, ...)`, with `labels (N,)` or without."""

    def __init__(self, values: npt.NDArray[Any], labels: npt.NDArray[Any] | None = None, name: str = "arrays"):
        if values.ndim < 1 or len(values) == 0:
            raise UsageError(f"data: {name} holds no samples (its inputs have the shape {values.shape})")
        if values.dtype.kind not in "fiub":
            raise UsageError(f"data: {name}: inputs must be numbers, but got {values.dtype}")
        self.kind: Literal["images", "inputs"] = "inputs"
        if values.dtype == np.uint8 and values.ndim in (3, 4):
            self.kind = "images"
            values = values[..., None] if values.ndim == 3 else values
            if values.shape[3] not in (1, 3, 4):
                raise UsageError(
                    f"data: {name}: 8-bit images must be (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels, "
                    f"but got {values.shape}; transpose them, or store ready inputs as float32"
                )
        self.labels = None if labels is None else _checked_labels(labels, len(values), name)
        self._values = values

    @classmethod
    def from_npz(cls, path: Path) -> "ArrayData":
        """Read `images` or `x`, and `labels` or `y` where given; pickled (object) arrays are refused."""
        if not zipfile.is_zipfile(path):
            raise UsageError(
                f"data: {path} is not an .npz file; write one with numpy.savez(path, images=..., labels=...)"
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                inputs = [key for key in ("images", "x") if key in archive.files]
                labels = [key for key in ("labels", "y") if key in archive.files]
                if len(inputs) != 1 or len(labels) > 1:
                    found = ", ".join(archive.files) or "nothing"
                    raise UsageError(f"data: {path} holds {found}; expected images (or x), and labels (or y) or none")
                return cls(archive[inputs[0]], archive[labels[0]] if labels else None, str(path))
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"data: {path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._values)

    def fingerprint(self) -> str:
        """The sha256 of shapes, dtypes and bytes of inputs and labels."""
        digest = hashlib.sha256()
        for array in (self._values,) if self.labels is None else (self._values, self.labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def batches(
        self, batch_size: int, preprocessing: Preprocessing | None, limit: int | None = None
    ) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        for rows in _rows(len(self), batch_size, limit):
            values = self._values[rows]
            if self.kind == "images" and preprocessing is not None:
                values = preprocessing.apply(values)
            yield values, None if self.labels is None else self.labels[rows]


class ImageFolderData:
    """`root/<class>/**/<image>`: labels are the positions of the class folders; images are read lazily."""

    kind: Literal["images", "inputs"] = "images"

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        self.classes = tuple(found if classes is None else classes)
        if not found:
            raise UsageError(f"data: {root} has no class folders; expected {root}/<class>/<image>.png")
        unknown, absent = sorted(set(found) - set(self.classes)), sorted(set(self.classes) - set(found))
        if unknown or absent or len(set(self.classes)) != len(self.classes):
            raise UsageError(
                f"data: the class list does not fit {root}: folders not in the list: {unknown or 'none'}, "
                f"listed without a folder: {absent or 'none'}, listed twice: "
                f"{sorted({name for name in self.classes if self.classes.count(name) > 1}) or 'none'}"
            )
        self._root = root
        self._files: list[Path] = []
        numbers: list[int] = []
        for number, name in enumerate(self.classes):
            files = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            self._files += files
            numbers += [number] * len(files)
        if not self._files:
            raise UsageError(f"data: no images under {root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        self.labels: npt.NDArray[np.int64] = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def fingerprint(self) -> str:
        """The sha256 of the class list and of every image's path and bytes."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for file in self._files:
            digest.update(file.relative_to(self._root).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def batches(
        self, batch_size: int, preprocessing: Preprocessing | None, limit: int | None = None
    ) -> Iterator[Batch]:
        """See `Dataset.batches`; every image is read as RGB, whatever its mode."""
        shape: tuple[int, ...] | None = None
        for rows in _rows(len(self), batch_size, limit):
            arrays = []
            for row in rows:
                picture = _decoded(self._files[row])
                array = picture if preprocessing is None else preprocessing.apply(picture[None])[0]
                if shape is not None and array.shape != shape:
                    raise UsageError(
                        f"data: {self._files[row]} gives {array.shape}, the images before it {shape}; "
                        "set resize and crop in the preprocessing so that all end up equal"
                    )
                shape = array.shape
                arrays.append(array)
            yield np.stack(arrays), self.labels[rows]


def _decoded(file: Path) -> npt.NDArray[np.uint8]:
    """One image file as uint8 `(H, W, 3)`; orientation tags are ignored, as torchvision does."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"data: {file} cannot be read as an image: {error}") from error


def _checked_labels(labels: npt.NDArray[Any], samples: int, name: str) -> npt.NDArray[np.int64]:
    """Labels as int64 `(N,)`, or the reason why they are none."""
    if labels.dtype.kind not in "iu":
        raise UsageError(f"data: {name}: labels must be integers (class numbers), but got {labels.dtype}")
    if labels.ndim != 1:
        raise UsageError(f"data: {name}: labels must be class numbers (N,), but got the shape {labels.shape}")
    if len(labels) != samples:
        raise UsageError(f"data: {name} holds {samples} inputs but {len(labels)} labels")
    return labels.astype(np.int64)


def _rows(samples: int, batch_size: int, limit: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers of each batch; under a limit they are spaced evenly over the samples."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"data: batch size and limit must be 1 or more, but got {batch_size} and {limit}")
    count = samples if limit is None else min(limit, samples)
    rows = np.arange(count, dtype=np.int64) * samples // count
    for start in range(0, count, batch_size):
        yield rows[start : start + batch_size]
