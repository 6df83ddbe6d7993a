"""A folder of transformers made an ONNX folder, once; the result is kept in the cache folder.

    CACHE/models/<key>/<name>/model.onnx [model.onnx.data]      float32
                              genai_config.json                 of decoders
                              ...                               all that lies beside the weights

Decoders become ONNX by onnxruntime-genai's builder, encoders by torch's exporter: `PROGRAM` runs them in a process of
its own, offline, on links to the folder's weights and documents; no code of the folder is among them.
The key names the folder's files with sizes and times, and the versions of the packages. The least recently used
conversions are removed while all exceed `KEPT_BYTES`, but none that was used within `SAFE_SECONDS`.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rsi_deploy import __version__
from rsi_deploy.core.cache_folder import cache_folder
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.progress import at, step
from rsi_deploy.io.atomic import claim_output
from rsi_deploy.io.folders.beside import files_beside
from rsi_deploy.io.folders.config import MODEL, is_decoder, read_config
from rsi_deploy.io.folders.transformers_folder import (
    CONFIG,
    check_transformers,
    is_transformers,
    staged_files,
    unsupported,
    weight_files,
)
from rsi_deploy.io.manifest import stat_hash

KEPT_BYTES = 32 << 30
"""Bytes of all conversions, above which the least recently used ones are removed."""
SAFE_SECONDS = 24 * 3600.0
"""A conversion that was used within this time may be in use still."""
PACKAGES = ("torch", "transformers", "onnxruntime-genai", "onnxscript")
PROGRAM = "rsi_deploy.torch_models.transformers_program"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}


def onnx_folder(folder: Path) -> Path:
    """Return the folder itself, or the ONNX folder that a folder of transformers becomes.

    Raises:
        UsageError: The folder cannot be converted as it is (see `check_transformers`), the cache folder cannot be
            written, or another run converts the same folder now.
        ModelError: Conversion failed; the message has the converter's own words.
    """
    if not is_transformers(folder):
        return folder
    check_transformers(folder)
    place = cache_folder() / "models"
    target = place / _key(folder) / folder.resolve().name
    if not target.is_dir():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the ONNX folder of {folder} cannot be kept in the cache folder: {error}",
                hint="set RSI_DEPLOY_CACHE to a folder that can be written",
            ) from error
        with step("convert"), claim_output(target) as claim:
            _convert(folder, claim.place / "source", claim.new)
            claim.deliver()
        _remove_old(place, target.parent)
    with contextlib.suppress(OSError):
        os.utime(target.parent)  # it was used now
    return target


def run_program(module: str, arguments: Sequence[str], log: Path) -> int:
    """Run a module in a process of its own, offline, with its output in a file; return the exit status."""
    command = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | OFFLINE, cwd=log.parent)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=1)
            at("", 0, 1)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _convert(folder: Path, source: Path, target: Path) -> None:
    """Write the ONNX folder of a folder of transformers.

    Args:
        folder: the user's folder.
        source: where to put what the converter reads.
        target: folder to make.

    Raises:
        ModelError: The converter failed.
    """
    source.mkdir()
    for path in staged_files(folder):
        with contextlib.suppress(OSError):
            os.symlink(path.resolve(), source / path.name)
        if not (source / path.name).exists():  # Windows without the right to make links
            shutil.copyfile(path, source / path.name)
    # Converters compute in the configuration's type: 1 + weight of Gemma's norms would be rounded to bfloat16.
    config = {name: value for name, value in read_config(folder).items() if name != "torch_dtype"}
    (source / CONFIG).unlink()
    (source / CONFIG).write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    target.mkdir()
    log = source.parent / "log.txt"
    status = run_program(PROGRAM, ["decoder" if is_decoder(folder) else "encoder", str(source), str(target)], log)
    if status or not (target / MODEL).is_file():
        killed = f"the converter was killed by signal {-status}, which is mostly for want of memory"
        raise unsupported(folder, killed if status < 0 else _last_line(log).replace(str(source), str(folder)))
    for name in files_beside(folder):
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / name)


def _last_line(log: Path) -> str:
    """Return what a program said last."""
    lines = log.read_text(encoding="utf-8", errors="replace")[-20_000:].replace("\r", "\n").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last.removeprefix(f"{ModelError.__module__}.{ModelError.__name__}: ")


def _key(folder: Path) -> str:
    """Return what identifies a conversion: the folder's files, and the versions of what converts them."""
    names = [*weight_files(folder), *files_beside(folder)]
    versions = [f"rsi-deploy {__version__}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    text = "\n".join([stat_hash(folder / name for name in names), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _remove_old(place: Path, used: Path) -> None:
    """Remove the least recently used conversions while all exceed `KEPT_BYTES`."""
    with contextlib.suppress(OSError):
        found = sorted((path for path in place.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime)
        total = 0
        for path in found:
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if total > KEPT_BYTES and path != used and time.time() - path.stat().st_mtime > SAFE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
