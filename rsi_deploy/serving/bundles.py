"""The model files that a server opens, and the check of their hashes.

    DIR/model.onnx [model.onnx.data]  a bundle: every file that report.json lists must have its sha256, and where there
                                      is a manifest.json, every file of the folder must match it
    FILE.onnx [FILE.onnx.data]        a plain model, served without a check
    DIR/genai_config.json             a decoder: a bundle, or a folder of onnxruntime-genai, served without a check
    DIR/tokenizer.json                an encoder: a bundle, or a folder of optimum-onnx, served without a check

`stamps` changes when a file is replaced. It reads no contents, so it can be called every second.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.folders.config import GENAI, TOKENIZER, is_decoder
from rsi_deploy.io.manifest import MANIFEST, check_manifest, file_hash
from rsi_deploy.io.model_folder import find_model
from rsi_deploy.report.bundle_facts import read_bundle_facts

Stamp = tuple[str, int, int, int]
"""Name, inode, size in bytes and modification time in ns of a file."""

Kind = Literal["tensors", "encoder", "decoder"]
"""What goes in and out: tensors; tensors, or texts and their embeddings; texts and their continuations."""

WATCHED = ("report.json", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A model on disk whose files have been checked.

    Attributes:
        path: the bundle's folder, or the ONNX file.
        model: the ONNX file.
        stamps: stamps of its files at the time of the check.
        preprocessing: steps from 8-bit pictures to inputs, if report.json has them.
        probe_shapes: input shapes that the model is known to run on, batch axis first.
        kind: what goes in and out.
    """

    path: Path
    model: Path
    stamps: tuple[Stamp, ...]
    preprocessing: Preprocessing | None = None
    probe_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kind: Kind = "tensors"


def open_bundle(path: Path) -> Bundle:
    """Open the bundle or ONNX file at `path` and check every hash that it lists.

    Raises:
        UsageError: `path` does not exist or cannot be served, or several of its files may be meant.
        ModelError: report.json has another schema.
        GateError: files are missing or changed.
    """
    before = stamps(path)
    if path.is_file():
        return Bundle(path=path, model=path, stamps=before)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; serve takes a bundle (rsi-deploy export -o DIR), an .onnx file or a folder"
        )
    if not (path / "report.json").is_file():
        if (kind := _kind(path)) != "tensors" and not (path / MANIFEST).is_file():
            return Bundle(path=path, model=find_model(path), stamps=before, kind=kind)
        raise UsageError(f"{path} is no bundle: it has no report.json; to serve a plain model, type its FILE.onnx")
    facts = read_bundle_facts(path)
    hash_once = functools.cache(file_hash)  # report and manifest list the same files
    manifest = check_manifest(path, hash_once)
    problems = file_problems(path, facts.files, hash_once) or ([] if manifest.ok else [manifest.summary])
    if problems:
        raise GateError(f"{path} is not served: {'; '.join(problems)}; export or fetch the bundle again")
    if stamps(path) != before:
        raise GateError(f"{path} changed while it was read; serve it when its files are complete")
    return Bundle(
        path=path,
        model=path / "model.onnx",
        stamps=before,
        preprocessing=facts.preprocessing,
        probe_shapes=facts.probe_shapes,
        kind=_kind(path),
    )


def _kind(folder: Path) -> Kind:
    if (folder / GENAI).is_file():
        return "decoder"
    return "encoder" if (folder / TOKENIZER).is_file() and not is_decoder(folder) else "tensors"


def file_problems(folder: Path, listed: Mapping[str, str], hash_of: Callable[[Path], str] = file_hash) -> list[str]:
    """Return one text for each kind of problem of a bundle's model files: missing, changed, not listed.

    Args:
        folder: the bundle.
        listed: file name -> sha256 in hexadecimal.
        hash_of: function that returns the sha256 of a file.
    """
    present = [name for name in ("model.onnx", "model.onnx.data") if (folder / name).is_file()]
    missing = [name for name in listed if not (folder / name).is_file()]
    unlisted = [name for name in present if name not in listed]
    changed = [name for name, digest in listed.items() if name not in missing and hash_of(folder / name) != digest]
    if "model.onnx" not in present and "model.onnx" not in missing:
        missing.append("model.onnx")
    found = {"missing": missing, "changed since report.json was written": changed, "not in report.json": unlisted}
    return [f"{problem}: {', '.join(names)}" for problem, names in found.items() if names]


def stamps(path: Path) -> tuple[Stamp, ...]:
    """Return the stamps of the model's files, report.json and manifest.json; those that do not exist are left out.

    A folder that is no bundle has those of all its files, and of the files in its folder `onnx`.
    """
    if path.is_dir() and not (path / "report.json").is_file():
        names = sorted(name for name in (*path.glob("*"), *path.glob("onnx/*")) if name.is_file())
    elif path.is_dir():
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
