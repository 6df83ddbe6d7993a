"""Check the licences of all packages that rsi-deploy installs: `python -m tests.release.licences`

It reads the metadata of the installed packages, from rsi-deploy's requirements on. In a licence expression, every part
of an AND must be allowed, and one part of an OR. The exit code is 1 if a licence is not allowed.
"""

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement

PROJECT = "rsi-deploy"
EXTRAS = ("cpu", "data", "genai", "hf", "loadgen", "ray", "serve", "test")

# SPDX names in lower case, and below spellings of old metadata.
ALLOWED = {
    "0bsd", "apache-2.0", "apache-2.0 with llvm-exception", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cnri-python", "isc", "mit", "mit-cmu", "mit-0", "mpl-2.0", "psf-2.0", "python-2.0", "unlicense", "zlib", "zpl-2.1",
}  # fmt: skip
SPELLINGS = {
    "3-clause bsd license": "bsd-3-clause",
    "apache 2.0": "apache-2.0",
    "apache 2.0 license": "apache-2.0",
    "apache license 2.0": "apache-2.0",
    "apache software license": "apache-2.0",
    "apache-2": "apache-2.0",
    "bsd": "bsd-3-clause",
    "bsd license": "bsd-3-clause",
    "isc license (iscl)": "isc",
    "mit license": "mit",
    "mozilla public license 2.0 (mpl 2.0)": "mpl-2.0",
    "python software foundation license": "psf-2.0",
    "the unlicense (unlicense)": "unlicense",
    "zope public license": "zpl-2.1",
}
# Distributions whose metadata have no allowed licence; a person has checked each of them.
CHECKED = {
    "cuda-toolkit": "an empty package that depends on NVIDIA's libraries; see nvidia-*",
    "mlcommons-loadgen": "Apache-2.0 in its repository (mlcommons/inference), not in its metadata. Optional",
    "nvidia-*": "proprietary, free to use and redistribute; only with torch's CUDA build (the default on Linux)",
}


@dataclass(frozen=True, kw_only=True)
class Licence:
    """The licence of a distribution, and a problem, or ""."""

    name: str
    text: str
    problem: str = ""


def normal(name: str) -> str:
    """Return a distribution's normalized name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: Iterable[str], find: Callable[[str], importlib.metadata.Distribution]) -> dict[str, str]:
    """Return distribution -> licence of a project and all installed packages that it requires."""
    found: dict[str, str] = {}
    waiting, seen = [(name, tuple(extras))], set()
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            distribution = find(package[0])
        except importlib.metadata.PackageNotFoundError:
            continue
        found[normal(package[0])] = licence_of(distribution)
        for requirement in map(Requirement, distribution.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *package[1])):
                waiting.append((requirement.name, tuple(sorted(requirement.extras))))
    return found


def licence_of(distribution: importlib.metadata.Distribution) -> str:
    """Return the SPDX expression in the metadata, else the classifiers, else the first line of the licence text."""
    metadata = distribution.metadata
    classified = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    named = [name for name in classified if name != "OSI Approved"]
    free = (metadata.get("License") or "").strip().split("\n")[0]
    return metadata.get("License-Expression") or " AND ".join(named) or free


def allowed(text: str) -> bool:
    """Return whether a licence is allowed without a check by a person.

    Example:
        >>> allowed("MIT OR GPL-3.0-only"), allowed("MIT AND GPL-3.0-only"), allowed("")
        (True, False, False)
    """
    parts = [
        [piece.strip(" ()").lower() for piece in re.split(r"\s+or\s+", part, flags=re.IGNORECASE)]
        for part in re.split(r"\s+and\s+", text, flags=re.IGNORECASE)
    ]
    whole = text.strip().lower()
    return SPELLINGS.get(whole, whole) in ALLOWED or all(
        any(SPELLINGS.get(piece, piece) in ALLOWED for piece in part) for part in parts
    )


def judged(name: str, text: str) -> Licence:
    """Return a distribution's licence with its problem."""
    checked = any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in CHECKED)
    if allowed(text) or (checked and "gpl" not in text.lower()):
        return Licence(name=name, text=text)
    return Licence(
        name=name,
        text=text,
        problem=f"{name}: its licence is {text or 'unknown'!r}, which is not allowed; replace it, or check it and"
        f" add it to tests/release/licences.py with the reason",
    )


def main() -> int:
    """Print every licence and problem; return 1 if there is a problem."""
    licences = [
        judged(name, text) for name, text in sorted(closure(PROJECT, EXTRAS, importlib.metadata.distribution).items())
    ]
    for licence in licences:
        print(f"{licence.name:28} {licence.text or 'unknown'}")
    problems = [licence.problem for licence in licences if licence.problem]
    print(*problems, f"{len(licences)} distributions, {len(problems)} with a licence that is not allowed", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
