"""A folder of class folders, `root/<class>/**/<image>`, read picture by picture."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import (
    Batch,
    Dataset,
    Kind,
    Labels,
    Steps,
    read_image,
    row_batches,
    stacked_pictures,
)
from rsi_deploy.io.system_files import is_system_file

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolderData:
    """Pictures whose labels are the positions of their class folders.

    Args:
        root: folder of class folders.
        classes: names of the class folders in label order; None sorts them by name. A class may have no folder, so that
            part of a model's classes keeps the model's numbers.

    Raises:
        UsageError: There are no class folders or images, a folder is not in the list, or a name repeats in it.
    """

    kind: Kind = "images"
    columns: tuple[str, ...] = ()
    default = ""

    def __init__(self, root: Path, classes: Sequence[str] | None = None):
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not is_system_file(entry.name))
        self.classes = tuple(found if classes is None else classes)
        if not found:
            raise UsageError(f"data: {root} has no class folders", hint=f"expected {root}/<class>/<image>.png")
        unknown = sorted(set(found) - set(self.classes))
        if unknown or len(set(self.classes)) != len(self.classes):
            raise UsageError(
                f"data: the class list does not fit {root}: folders not in the list: {unknown or 'none'}, listed "
                f"twice: {sorted({name for name in self.classes if self.classes.count(name) > 1}) or 'none'}",
                hint="name every folder once in it",
            )
        self._root = root
        self._files: list[Path] = []
        numbers: list[int] = []
        for number, name in enumerate(self.classes):
            files = sorted(file for file in (root / name).rglob("*") if _is_image(file, root / name))
            self._files += files
            numbers += [number] * len(files)
        if not self._files:
            raise UsageError(
                f"data: no images under {root}", hint=f"expected files ending in {', '.join(IMAGE_SUFFIXES)}"
            )
        self.labels: Labels = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def select(self, names: Sequence[str]) -> Dataset:
        """Raise UsageError: pictures have no columns."""
        raise UsageError(
            f"data: {self._root} has pictures for one input, but the model takes {', '.join(names)}",
            hint="give an .npz with one array for each of them",
        )

    def fingerprint(self) -> str:
        """Return the sha256 of the class list and of every image's path and bytes."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for file in self._files:
            digest.update(file.relative_to(self._root).as_posix().encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        shape: tuple[int, ...] | None = None
        for rows in row_batches(len(self), batch_size, limit):
            files = ((str(file), read_image(file, str(file))) for file in (self._files[row] for row in rows))
            pictures = stacked_pictures(files, preprocessing, shape)
            shape = pictures.shape[1:]
            yield pictures, self.labels[rows]


def _is_image(file: Path, folder: Path) -> bool:
    """Return whether a file has an image suffix and is neither hidden nor a system file."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_system_file(file.relative_to(folder)) and file.is_file()
