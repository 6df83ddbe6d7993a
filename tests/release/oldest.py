"""The lowest versions that pyproject.toml allows: `python -m tests.release.oldest > constraints-oldest.txt`

Every requirement of the project and of the extras for the tests is pinned at its lower bound; pip chooses the rest.
tests/test_oldest.py compares the stored file; `make oldest` runs the core of the tests with these versions.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ("cpu", "data", "genai", "hf", "loadgen", "serve", "test")
BOUND = re.compile(r"(?P<name>[\w.-]+)(?P<extras>\[[\w,]+\])?>=(?P<version>[\d.]+)(?P<marker>\s*;.*)?")
HEADER = "# The oldest versions of pyproject.toml; made by python -m tests.release.oldest, tried by make oldest."


def oldest(project: dict[str, Any]) -> str:
    """Return the constraints for a project table.

    Raises:
        ValueError: a requirement has no lower bound, or two different ones.
    """
    pins: dict[str, str] = {}
    optional = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(line for extra in EXTRAS for line in optional[extra])]:
        if requirement.startswith(f"{project['name']}["):
            continue  # the project itself with another extra
        found = BOUND.fullmatch(requirement)
        if found is None:
            raise ValueError(f"pyproject.toml: {requirement!r} has no lower bound; write NAME>=VERSION")
        name, version = found["name"], found["version"]
        if pins.setdefault(name, version) != version:
            raise ValueError(f"pyproject.toml: {name} has the lower bounds {pins[name]} and {version}; give it one")
    return "\n".join([HEADER, *(f"{name}=={pins[name]}" for name in sorted(pins, key=str.lower))]) + "\n"


def main() -> int:
    """Print the constraints."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sys.stdout.write(oldest(table["project"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
