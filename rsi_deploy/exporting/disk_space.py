"""The space that an export takes on the disk while it runs, checked as early as possible.

dense model             1 x its weights
full-rank split         1 to 2 x    (the check of the surgery; all weights, and a square factor for each site)
compressed model        up to 1 x
results of large models up to 1 x   (for a next run, if this one is interrupted)
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rsi_deploy.exporting.results import dense_file
from rsi_deploy.io.atomic import FULL_DISK
from rsi_deploy.io.onnx_file import file_bytes

MOST = 5
"""Largest space, in times the dense model's bytes."""


def check_space(folder: Path) -> None:
    """Refuse to begin the long work where the full-rank split will not fit.

    Args:
        folder: folder of the bundle in the making, with the dense model.

    Raises:
        OSError: less is free than the full-rank split takes.
    """
    dense = file_bytes(dense_file(folder))
    if shutil.disk_usage(folder).free < dense:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@contextlib.contextmanager
def states_space(folder: Path) -> Iterator[None]:
    """Add to the error of a full disk how much space an export of this model takes."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK and dense_file(folder).is_file():
            most = MOST * file_bytes(dense_file(folder))
            error.add_note(f"an export of this model writes up to {most / 1e6:,.1f} MB there")
        raise
