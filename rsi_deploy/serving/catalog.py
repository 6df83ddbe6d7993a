"""The names and versions of the served models, parsed from `[NAME[:VERSION]=]PATH`, and the routes of requests.

    PATH of a bundle or FILE.onnx        version 1 of NAME; NAME defaults to the name of the folder or file
    PATH of numbered folders (1/ 2/ ...) each folder is a bundle and a version of NAME
    --canary PATH --canary-share 10%     the next version; answers that share of the requests that name no version
    --shadow PATH                        the next version; is compared with the main version

A request that names no version is answered by the newest version that is neither canary nor shadow.
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
class ServedModel:
    """One version of one model.

    Attributes:
        name: name of the model.
        version: a number of 1 or more, as text.
        bundle: its files.
        generation: number of times the files have been replaced since the server started.
    """

    name: str
    version: str
    bundle: Bundle
    generation: int = 0

    @property
    def is_decoder(self) -> bool:
        """Whether it generates text; it answers no other requests."""
        return self.bundle.kind == "decoder"

    @property
    def key(self) -> str:
        """Identifier of these files among all that are or were served."""
        return f"{self.name}:{self.version}#{self.generation}"


@dataclass(kw_only=True)
class Route:
    """The versions of one model, and which of them answers a request.

    Attributes:
        name: name of the model.
        versions: version -> model; changes when a bundle is replaced.
        main: the version that answers requests that name none.
        canary: the version that answers `share` of those requests, or "".
        share: share of the canary, 0 to 1.
        shadow: the version that is compared with the main one, or "".
    """

    name: str
    versions: dict[str, ServedModel] = field(default_factory=dict)
    main: str = ""
    canary: str = ""
    share: float = 0.0
    shadow: str = ""
    _requests: int = 0

    def pick(self, version: str) -> ServedModel:
        """Return the model for a request; version "" means none was named. Canary requests are evenly spread.

        Raises:
            Refusal: 404, no such version.
        """
        if version:
            if version not in self.versions:
                known = ", ".join(sorted(self.versions, key=int))
                raise Refusal(404, f"model {self.name} has no version {version[:40]!r}; it has {known}")
            return self.versions[version]
        if self.canary:
            before = int(self._requests * self.share + 1e-9)
            self._requests += 1
            if int(self._requests * self.share + 1e-9) > before:
                return self.versions[self.canary]
        return self.versions[self.main]


class Catalog(dict[str, Route]):
    """A mapping from the name of a model to its route.

    Attributes:
        refused: "NAME, version N" -> why it is not served.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: dict[str, RsiDeployError] = {}

    def refuse(self, name: str, version: str, error: RsiDeployError) -> None:
        """Record why a version is not served, and remove it from its route."""
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

    def check_not_empty(self) -> None:
        """Raise the error of the first refused model if no model is left.

        Raises:
            RsiDeployError: no model can be served.
        """
        if not self and self.refused:
            first_refusal = next(iter(self.refused.values()))
            raise first_refusal


def read_catalog(models: Sequence[str], *, canary: str = "", canary_share: float = 0.0, shadow: str = "") -> Catalog:
    """Parse the arguments of `serve` and check every bundle.

    Args:
        models: texts `[NAME[:VERSION]=]PATH`.
        canary: `[NAME=]PATH`, or "".
        canary_share: 0 to 1.
        shadow: `[NAME=]PATH`, or "".

    Raises:
        UsageError: a name or version is invalid or repeated, a path does not exist, or a canary or shadow has no model.
        ModelError, GateError: the error of `open_bundle` for the first model, if no model can be served.
    """
    routes = Catalog()
    for name, version, path in [found for text in models for found in _versions(text)]:
        if name in routes and version in routes[name].versions:
            raise UsageError(f"{name} version {version} is given twice; type NAME:VERSION=PATH for one of them")
        try:
            served = ServedModel(name=name, version=version, bundle=open_bundle(path))
        except (ModelError, GateError) as error:
            routes.refuse(name, version, error)
            continue
        routes.setdefault(name, Route(name=name)).versions[version] = served
    routes.check_not_empty()
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
        if route.versions[route.shadow].is_decoder:
            raise UsageError("--shadow compares outputs, which decoders do not give; leave it out, or type --canary")
    return routes


def with_absolute_path(text: str) -> str:
    """Return `[NAME[:VERSION]=]PATH` with an absolute PATH, for a process with another working folder.

    Example:
        >>> with_absolute_path("m:2=/models/m"), with_absolute_path("/models/a=b")
        ('m:2=/models/m', '/models/a=b')
    """
    label, equals, rest = text.partition("=")
    if not equals or "/" in label or not rest:
        return str(Path(text).absolute())
    return f"{label}={Path(rest).absolute()}"


def all_versions(routes: Mapping[str, Route]) -> list[ServedModel]:
    """Return every version of every model."""
    return [served for route in routes.values() for served in route.versions.values()]


def reopened(served: ServedModel) -> ServedModel:
    """Return the same name and version with the files that are on disk now.

    Raises:
        UsageError, ModelError, GateError: see `open_bundle`.
    """
    return dataclasses.replace(served, bundle=open_bundle(served.bundle.path), generation=served.generation + 1)


def _versions(text: str) -> list[tuple[str, str, Path]]:
    """Return name, version and path of every model that one argument stands for."""
    name, version, path = _parsed(text)
    name = name or path.absolute().name.removesuffix(".onnx")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{text}: a model's name is letters, digits, '.', '_' and '-', but got {name!r}; type NAME=PATH"
        )
    numbered = [] if version or not path.is_dir() or (path / "report.json").is_file() else _numbered(path)
    return [(name, folder.name, folder) for folder in numbered] or [(name, version or "1", path)]


def _parsed(text: str) -> tuple[str, str, Path]:
    """Return the name, version and path in an argument; name and version are "" if they are not in it."""
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
    """Add a canary or shadow to its route as the newest version."""
    name, version, path = _parsed(text)
    if version:
        raise UsageError(f"{option} {text}: its version is always the next one; type [NAME=]PATH")
    if not name and len(routes) > 1:
        raise UsageError(f"{option} {text}: which of {', '.join(routes)} is it for? Type {option} NAME={path}")
    name = name or next(iter(routes))
    if name not in routes:
        raise UsageError(f"{option} {text}: no model {name!r} is served; expected one of {', '.join(routes)}")
    route = routes[name]
    number = str(max(map(int, route.versions)) + 1)
    route.versions[number] = ServedModel(name=name, version=number, bundle=open_bundle(path))
    return route
