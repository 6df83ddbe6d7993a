"""The option `--replicas`."""

import re

from rsi_deploy.core.errors import UsageError


def parse_replicas(text: str) -> tuple[int, int]:
    """Parse the fewest and the most replicas.

    Example:
        >>> parse_replicas("1-4"), parse_replicas("2")
        ((1, 4), (2, 2))

    Raises:
        UsageError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not 0 <= least <= most or most < 1:
        raise UsageError(f"--replicas must be the fewest and the most, such as 1-4, but got {text!r}")
    return least, most
