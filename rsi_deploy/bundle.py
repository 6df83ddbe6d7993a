"""The bundle: a folder that appears whole under its name, or not at all.

    DIR/model.onnx  [model.onnx.data]     the compressed model
    DIR/report.json                       everything that was decided and measured
    DIR/README.md                         the model card

Everything is written into `.DIR.partial-XXXX` beside it, which takes the name in one rename at the end. Whatever ends
the work early (an error, Ctrl-C, a full disk) removes that folder and leaves the old bundle as it was.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from rsi_deploy.errors import UsageError

# Above this many bytes of weights they go to model.onnx.data: a protobuf cannot pass 2 GiB, and copies cost memory.
INLINE_LIMIT = 1 << 30


def check_target(path: Path, *, force: bool) -> None:
    """Refuse, before any long work, a target that would overwrite something.

    Raises:
        UsageError: a file, or a folder that is not empty without `force`.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file; -o takes a folder")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UsageError(f"{path} is not empty; choose another folder, or add --force to replace it")
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"cannot write into {existing}; choose another folder for -o")


@contextlib.contextmanager
def whole_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A working folder that becomes `path` when the block ends well, and vanishes when it does not.

    Args:
        path: the final name.
        force: replace a folder that is there and not empty.

    Raises:
        UsageError: see `check_target`; it is checked again at the end, since hours may lie between.
    """
    check_target(path, force=force)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield work
        check_target(path, force=force)
        os.chmod(work, 0o755)  # mkdtemp's 0700 would hide the bundle from a server's user
        _replace(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_model(model: ir.Model, path: Path) -> None:
    """Write the model as one file, or with `NAME.data` beside it above `INLINE_LIMIT` bytes of weights."""
    if weight_bytes(model) > INLINE_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data")
        return
    ir.external_data.load_to_model(model)  # else a weight read from another file would go on living there
    ir.save(model, path)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def parameters(model: ir.Model) -> int:
    """Numbers in all floating initializers of the main graph."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def file_bytes(path: Path) -> int:
    """Bytes of a model file and of its data file."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _replace(work: Path, path: Path) -> None:
    """Rename `work` to `path`; what was there is moved aside first and comes back if the rename fails."""
    if not path.exists():
        os.replace(work, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.parent))
    os.replace(path, aside / "old")
    try:
        os.replace(work, path)
    except BaseException:
        os.replace(aside / "old", path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
