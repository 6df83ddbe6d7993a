"""Files and folders that operating systems leave beside data: hidden ones, and `._*` and `__MACOSX` of macOS."""

from pathlib import PurePath

_NAMES = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "desktop.ini", "lost+found", "thumbs.db"}


def is_system_file(path: str | PurePath) -> bool:
    """Return whether any part of a relative path is hidden or belongs to the operating system.

    Example:
        >>> is_system_file("__MACOSX/cat/a.png"), is_system_file("cat/._a.png"), is_system_file("cat/a.png")
        (True, True, False)
    """
    return any(part.startswith(".") or part.lower() in _NAMES for part in PurePath(path).parts)
