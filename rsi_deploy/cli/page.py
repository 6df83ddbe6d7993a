"""`bench --html FILE`: the page of a measurement, written whole or not at all."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.atomic import write_text

if TYPE_CHECKING:
    from rsi_deploy.benchmark.result import BenchDocument


def check_page(html: str | None) -> Path | None:
    """Return the file of the page, or refuse it before any long work.

    Raises:
        UsageError: the file exists, or its folder cannot be written to.
    """
    if html is None:
        return None
    path = Path(html)
    if path.exists():
        raise UsageError(f"--html {html} is there already; type another name, or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write into {path.parent}; type another place for --html")
    return path


def write_page(document: "BenchDocument", path: Path | None) -> None:
    """Write the page of `document`; what ends the work early leaves nothing behind."""
    if path is None:
        return
    from rsi_deploy.report.pages.bench import bench_page

    write_text(path, bench_page(document))
