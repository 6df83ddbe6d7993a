"""Python's cyclic collector, out of the way of a rewrite.

It walks everything again whenever a quarter of it is new: on a large graph several times, for nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Without the cyclic collector, if it was on.

    What a rewrite drops is freed by its reference counts; the few cycles wait for the next collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
