"""Zip archives (`.npz`, `.pth`, `.pt2`) before anything is unpacked: what they would unpack to, and each name once."""

import zipfile
from pathlib import Path

UNPACKED_BYTES = 512 << 20
"""What an archive may unpack to, whatever its size on disk."""

UNPACKED_RATIO = 200
"""Bytes that an archive above that may unpack to for each byte on disk."""


def check_archive(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of the archive at `path`.

    Raises:
        ValueError: no archive, a name twice, an entry that is encrypted or compressed in a way that is not read here,
            or far more than its size once it is unpacked; says which, and what to do.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no zip archive, or a damaged one: {error}") from error
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("the archive holds a name twice")
    for entry in entries:
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("the archive is encrypted or compressed in a way that is not read here; write it anew")
    unpacked, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    if unpacked > max(UNPACKED_BYTES, UNPACKED_RATIO * packed):
        raise ValueError(
            f"its {packed} bytes would unpack to {unpacked}, which is refused; write it without compression "
            "(numpy.savez in place of savez_compressed)"
        )
    return entries
