"""Pause Python's cyclic garbage collector during a rewrite.

The collector walks all objects whenever a quarter of them is new: several times on a large graph, and frees nothing.
"""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Turn the cyclic collector off, and on again if it was on.

    Reference counts free what a rewrite drops; the few cycles wait for the next collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
