"""Check zip archives (`.npz`, `.pth`, `.pt2`) before they are unpacked: their unpacked size, and names that repeat."""

import zipfile
from pathlib import Path

UNPACKED_BYTES = 512 << 20
"""Bytes that any archive may unpack to, whatever its size on disk."""

UNPACKED_RATIO = 200
"""For archives that unpack to more than `UNPACKED_BYTES`: the highest ratio of unpacked bytes to bytes on disk."""


def check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of the archive at `path`.

    Raises:
        ValueError: The file is not a zip archive, a name repeats, an entry is encrypted or uses another compression
            than deflate, or the archive would unpack to far more than its size.
        OSError: The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not a zip archive, or it is damaged: {error}") from error
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("the archive contains a name twice")
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("the archive is encrypted or uses an unsupported compression; write it again")
    unpacked, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * packed):
        raise ValueError(
            f"its {packed} bytes would unpack to {unpacked}, which is refused; write it without compression "
            "(numpy.savez in place of savez_compressed)"
        )
    return entries
