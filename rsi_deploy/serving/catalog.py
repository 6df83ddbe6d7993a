"""Which models are served under which names and versions: `[NAME[:VERSION]=]PATH` as typed, and what answers a name.

    PATH of a bundle or FILE.onnx        version 1 of NAME, by default the folder's or file's own name
    PATH of numbered folders (1/ 2/ ...) each a bundle, all of them versions of NAME
    --canary PATH --canary-share 10%     the next version; answers that share of the requests that name no version
    --shadow PATH                        the next version; runs beside the one that answers, and is compared with it

A request that names no version gets the newest that is no canary or shadow.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rsi_deploy.core.errors import GateError, ModelError, RsiDeployError, UsageError
from rsi_deploy.serving.bundles import Bundle, open_bundle
from rsi_deploy.serving.protocol.refusal import Refusal

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version of one model.

    Attributes:
        name: of the model.
        version: a number of 1 or more, as text.
        bundle: its files.
        generation: how often the files have been replaced since the server started.
    """

    name: str
    version: str
    bundle: Bundle
    generation: int = 0

    @property
    def key(self) -> str:
        """Names these very files among all that are or were served."""
        return f"{self.name}:{self.version}#{self.generation}"


@dataclass(kw_only=True)
class Route:
    """What answers a name.

    Attributes:
        name: of the model.
        versions: version -> what is served; grows and changes as bundles are replaced.
        main: the version that answers where none is named.
        canary: the version that answers `share` of those, or "".
        share: of the canary, 0 to 1.
        shadow: the version that runs beside, or "".
    """

    name: str
    versions: dict[str, Served] = field(default_factory=dict)
    main: str = ""
    canary: str = ""
    share: float = 0.0
    shadow: str = ""
    _asked: int = 0

    def pick(self, version: str) -> Served:
        """What answers a request; "" names no version. The canary gets its share exactly, evenly spread.

        Raises:
            Refusal: 404, no such version.
        """
        if version:
            if version not in self.versions:
                have = ", ".join(sorted(self.versions, key=int))
                raise Refusal(404, f"model {self.name} has no version {version[:40]!r}; it has {have}")
            return self.versions[version]
        if self.canary:
            before = int(self._asked * self.share + 1e-9)
            self._asked += 1
            if int(self._asked * self.share + 1e-9) > before:
                return self.versions[self.canary]
        return self.versions[self.main]


class Catalog(dict[str, Route]):
    """Name -> what answers it.

    Attributes:
        refused: "NAME, version N" -> why it is not served, while others are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, RsiDeployError] = {}

    def refuse(self, name: str, version: str, error: RsiDeployError) -> None:
        """Note why a version is not served, and take it out where it is in."""
        self.refused[label := f"{name}, version {version}"] = error
        logger.error("%s is not served: %s", label, error)
        if (route := self.get(name)) is None or route.versions.pop(version, None) is None:
            return
        if version == route.canary:
            route.canary, route.share = "", 0.0
        if version == route.shadow:
            route.shadow = ""
        left = [number for number in route.versions if number not in (route.canary, route.shadow)]
        if left:
            route.main = max(left, key=int)
        else:
            del self[name]

    def check_any(self) -> None:
        """Refuse to serve nothing.

        Raises:
            RsiDeployError: as the first model was refused with.
        """
        if not self and self.refused:
            first_refusal = next(iter(self.refused.values()))
            raise first_refusal


def read_catalog(models: Sequence[str], *, canary: str = "", canary_share: float = 0.0, shadow: str = "") -> Catalog:
    """What the arguments say is to be served, every bundle checked.

    Args:
        models: `[NAME[:VERSION]=]PATH` each.
        canary: `[NAME=]PATH`, or "".
        canary_share: 0 to 1.
        shadow: `[NAME=]PATH`, or "".

    Raises:
        UsageError: names or versions that are none, or are given twice; nothing at a path; a canary of no model.
        ModelError, GateError: see `open_bundle`; of the first model, where none can be served.
    """
    routes = Catalog()
    for name, version, path in [found for text in models for found in _versions(text)]:
        if name in routes and version in routes[name].versions:
            raise UsageError(f"{name} version {version} is given twice; type NAME:VERSION=PATH to tell them apart")
        try:
            served = Served(name=name, version=version, bundle=open_bundle(path))
        except (ModelError, GateError) as error:
            routes.refuse(name, version, error)
            continue
        routes.setdefault(name, Route(name=name)).versions[version] = served
    routes.check_any()
    if not routes:
        raise UsageError("nothing to serve: name a bundle, rsi-deploy serve DIR")
    for route in routes.values():
        route.main = max(route.versions, key=int)
    if bool(canary) != bool(canary_share):
        raise UsageError("--canary and --canary-share go together, e.g. --canary DIR --canary-share 10%")
    if canary:
        route = _candidate(routes, canary, "--canary")
        route.canary, route.share = max(route.versions, key=int), canary_share
    if shadow:
        route = _candidate(routes, shadow, "--shadow")
        route.shadow = max(route.versions, key=int)
    return routes


def anchored(text: str) -> str:
    """`[NAME[:VERSION]=]PATH` with PATH from the root, for a process that has another current folder.

    Example:
        >>> anchored("m:2=/models/m"), anchored("/models/a=b")
        ('m:2=/models/m', '/models/a=b')
    """
    label, equals, rest = text.partition("=")
    if not equals or "/" in label or not rest:
        return str(Path(text).absolute())
    return f"{label}={Path(rest).absolute()}"


def all_served(routes: Mapping[str, Route]) -> list[Served]:
    """Every version of every model."""
    return [served for route in routes.values() for served in route.versions.values()]


def replaced(served: Served) -> Served:
    """The same name and version with the files that are there now.

    Raises:
        UsageError, ModelError, GateError: see `open_bundle`.
    """
    return dataclasses.replace(served, bundle=open_bundle(served.bundle.path), generation=served.generation + 1)


def _versions(text: str) -> list[tuple[str, str, Path]]:
    """Name, version and path of everything that one argument names."""
    name, version, path = _parsed(text)
    name = name or path.absolute().name.removesuffix(".onnx")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{text}: a model's name is letters, digits, '.', '_' and '-', but got {name!r}; type NAME=PATH"
        )
    numbered = [] if version or not path.is_dir() or (path / "report.json").is_file() else _numbered(path)
    return [(name, folder.name, folder) for folder in numbered] or [(name, version or "1", path)]


def _parsed(text: str) -> tuple[str, str, Path]:
    """Name, version and path as far as they are typed; "" where they are not."""
    label, equals, rest = text.partition("=")
    if not equals or "/" in label:
        return "", "", Path(text)
    name, colon, version = label.partition(":")
    if colon and (not version.isdecimal() or version.startswith("0")):
        raise UsageError(f"{text}: a version is a number of 1 or more, but got {version!r}")
    if not rest:
        raise UsageError(f"{text}: expected [NAME[:VERSION]=]PATH")
    return name, version, Path(rest)


def _numbered(path: Path) -> list[Path]:
    found = [p for p in path.iterdir() if p.is_dir() and p.name.isdecimal() and not p.name.startswith("0")]
    return sorted(found, key=lambda p: int(p.name))


def _candidate(routes: Catalog, text: str, option: str) -> Route:
    """Add a canary or shadow to the route it belongs to, as its newest version."""
    name, version, path = _parsed(text)
    if version:
        raise UsageError(f"{option} {text}: it becomes the next version by itself; type [NAME=]PATH")
    if not name and len(routes) > 1:
        raise UsageError(f"{option} {text}: which of {', '.join(routes)} is it for? Type {option} NAME={path}")
    name = name or next(iter(routes))
    if name not in routes:
        raise UsageError(f"{option} {text}: no model {name!r} is served; there are {', '.join(routes)}")
    route = routes[name]
    number = str(max(map(int, route.versions)) + 1)
    route.versions[number] = Served(name=name, version=number, bundle=open_bundle(path))
    return route
