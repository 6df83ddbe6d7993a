"""The cache folder: $RSI_DEPLOY_CACHE, else $XDG_CACHE_HOME/rsi-deploy, else ~/.cache/rsi-deploy."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder, which may not exist yet."""
    if chosen := os.environ.get("RSI_DEPLOY_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rsi-deploy"
