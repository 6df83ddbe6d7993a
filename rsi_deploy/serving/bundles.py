"""What is served: the files of a bundle, believed only as far as their hashes agree with what the bundle claims.

    DIR/model.onnx [model.onnx.data]  with report.json beside it: every file it lists must have its sha256, and every
                                      file of the folder must be as manifest.json has it, where there is one
    FILE.onnx [FILE.onnx.data]        claims nothing, and is served as it is

`stamps` is what a watcher looks at: it changes when a file is replaced, and costs no reading.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.manifest import check_inner_name, check_manifest, file_hash

Stamp = tuple[str, int, int, int]
"""Of a file: name, inode, bytes, time of its last change in ns."""

WATCHED = ("report.json", "manifest.json")


class _Claims(pydantic.BaseModel, frozen=True, extra="ignore"):
    """What a server needs of report.json; the whole of it needs torch to be read."""

    schema_version: Literal[1]
    files: dict[Annotated[str, pydantic.AfterValidator(check_inner_name)], str]
    preprocessing: Preprocessing | None = None
    probe_shapes: dict[str, tuple[int, ...]] = pydantic.Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model on disk whose files have been checked.

    Attributes:
        path: as given: a folder, or an ONNX file.
        model: the ONNX file.
        stamps: of its files when they were checked.
        preprocessing: from 8-bit pictures to inputs, where report.json says it.
        probe_shapes: shapes of inputs that the model is known to run on, batch first.
    """

    path: Path
    model: Path
    stamps: tuple[Stamp, ...]
    preprocessing: Preprocessing | None = None
    probe_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def open_bundle(path: Path) -> Bundle:
    """The bundle or ONNX file at `path`, with every hash that is claimed computed again.

    Raises:
        UsageError: nothing there, or nothing that can be served.
        ModelError: a report.json of another schema.
        GateError: files that are missing or are not what the bundle claims.
    """
    before = stamps(path)
    if path.is_file():
        return Bundle(path=path, model=path, stamps=before)
    if not path.exists():
        raise UsageError(f"{path} does not exist; serve takes a bundle (rsi-deploy export -o DIR) or an .onnx file")
    if not (path / "report.json").is_file():
        raise UsageError(f"{path} is no bundle: it has no report.json; name the file to serve a plain model: FILE.onnx")
    claims = _claims(path)
    hash_once = functools.cache(file_hash)  # report and manifest list the same files
    listed = check_manifest(path, hash_once)
    if problems := broken_files(path, claims.files, hash_once):
        raise GateError(f"{path} is not served: {'; '.join(problems)}; export or fetch the bundle again")
    if not listed.ok:
        raise GateError(f"{path} is not served: {listed.summary}; export or fetch the bundle again")
    if stamps(path) != before:
        raise GateError(f"{path} changed while it was read; serve it when it is whole")
    return Bundle(
        path=path,
        model=path / "model.onnx",
        stamps=before,
        preprocessing=claims.preprocessing,
        probe_shapes=claims.probe_shapes,
    )


def broken_files(folder: Path, claimed: Mapping[str, str], hash_of: Callable[[Path], str] = file_hash) -> list[str]:
    """What is wrong with the model files of a folder: missing, changed, or claimed by nobody.

    Args:
        folder: of the bundle.
        claimed: name -> sha256 in hexadecimal.
        hash_of: the sha256 of a file.
    """
    present = [name for name in ("model.onnx", "model.onnx.data") if (folder / name).is_file()]
    missing = [name for name in claimed if not (folder / name).is_file()]
    unclaimed = [name for name in present if name not in claimed]
    changed = [name for name, digest in claimed.items() if name not in missing and hash_of(folder / name) != digest]
    found = {"missing": missing, "not what the bundle claims": changed, "claimed by nobody": unclaimed}
    if "model.onnx" not in present and "model.onnx" not in missing:
        missing.append("model.onnx")
    return [f"{what}: {', '.join(names)}" for what, names in found.items() if names]


def stamps(path: Path) -> tuple[Stamp, ...]:
    """The stamps of the model's files and of what claims them; empty where there is no model."""
    if path.is_dir():
        names = [path / name for name in ("model.onnx", "model.onnx.data", *WATCHED)]
    else:
        names = [path, path.with_name(f"{path.name}.data")]
    found = []
    for name in names:
        try:
            stat = name.stat()
        except OSError:
            continue
        found.append((name.name, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _claims(folder: Path) -> _Claims:
    try:
        return _Claims.model_validate_json(read_document(folder / "report.json"))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(
            f"{folder / 'report.json'} is no report that can be served: {where}: {first['msg']}; export again"
        ) from error
