"""Are the licences of all that rsi-deploy installs ones that users can live with? `python -m tests.release.licences`

Reads the metadata of what is installed here, from rsi-deploy's own requirements on down. A licence is taken apart at
AND and OR: every part of an AND must be allowed, one part of an OR is enough. What is not allowed ends with exit 1.
"""

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement

PROJECT = "rsi-deploy"
EXTRAS = ("cpu", "data", "loadgen", "ray", "serve", "test")

# By SPDX name; in lower case, as are the spellings that old metadata use.
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
# Distributions whose metadata name no allowed licence, each looked at by a person.
LOOKED_AT = {
    "cuda-toolkit": "a name that only depends on NVIDIA's libraries; see nvidia-*",
    "mlcommons-loadgen": "Apache-2.0 in its repository (mlcommons/inference); its metadata say nothing. Optional",
    "nvidia-*": "proprietary, free to use and pass on; only where torch's CUDA build is chosen (Linux's default)",
}


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a distribution says of itself, and what is wrong with it; empty where nothing is."""

    name: str
    text: str
    problem: str = ""


def normal(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: Iterable[str], find: Callable[[str], importlib.metadata.Distribution]) -> dict[str, str]:
    """Licence text by distribution of a project and all that it requires here; absent optional ones are left out."""
    found: dict[str, str] = {}
    waiting, seen = [(name, tuple(extras))], set()
    while waiting:
        asked = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            distribution = find(asked[0])
        except importlib.metadata.PackageNotFoundError:
            continue
        found[normal(asked[0])] = told(distribution)
        for requirement in map(Requirement, distribution.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *asked[1])):
                waiting.append((requirement.name, tuple(sorted(requirement.extras))))
    return found


def told(distribution: importlib.metadata.Distribution) -> str:
    """The licence that its metadata tell: an SPDX expression, else the classifiers, else the free text's first line."""
    metadata = distribution.metadata
    classified = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or [] if line.startswith("License ::")
    ]
    named = [name for name in classified if name != "OSI Approved"]
    free = (metadata.get("License") or "").strip().split("\n")[0]
    return metadata.get("License-Expression") or " AND ".join(named) or free


def allowed(text: str) -> bool:
    """Whether a licence text can be accepted without a person's look.

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
    """A distribution's licence with what is wrong about it."""
    looked_at = any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in LOOKED_AT)
    if allowed(text) or (looked_at and "gpl" not in text.lower()):
        return Licence(name=name, text=text)
    return Licence(
        name=name,
        text=text,
        problem=f"{name}: its licence is {text or 'not told'!r}, which is not allowed; replace it, or look at it and"
        f" add it to tests/release/licences.py with the reason",
    )


def main() -> int:
    """Print every licence and what is wrong; 1 where something is."""
    licences = [
        judged(name, text) for name, text in sorted(closure(PROJECT, EXTRAS, importlib.metadata.distribution).items())
    ]
    for licence in licences:
        print(f"{licence.name:28} {licence.text or 'not told'}")
    problems = [licence.problem for licence in licences if licence.problem]
    print(*problems, f"{len(licences)} distributions, {len(problems)} with a licence that is not allowed", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
