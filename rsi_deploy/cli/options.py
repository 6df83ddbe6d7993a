"""The arguments that name models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rsi_deploy.cli.terminal import progress_bar
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.folders.transformers_folder import check_transformers, is_transformers
from rsi_deploy.io.model_folder import model_file

F = TypeVar("F", bound=Callable[..., Any])
EARLY_BYTES = 64 << 20
"""An ONNX file up to this size is checked before anything large is imported: it is parsed twice for that."""


def model_argument(*, required: bool = True) -> Callable[[F], F]:
    """Declare the argument MODEL."""
    return click.argument("model", metavar="MODEL" if required else "[MODEL]", required=required, callback=_checked)


def _checked(context: click.Context, parameter: click.Parameter, model: str | None) -> str | None:
    """Refuse a small ONNX file that claims what cannot be, before torch takes time and memory."""
    if model is None:
        return None
    if Path(model).is_dir() and is_transformers(Path(model)):
        check_transformers(Path(model))  # it is converted later, when all options are known to be right
        return model
    path = Path(str(model_file(model)))
    if path.suffix == ".onnx" and path.is_file() and path.stat().st_size <= EARLY_BYTES:
        from rsi_deploy.io.onnx_reader import check_file

        check_file(path)
    return model


def onnx_path(text: str) -> Path:
    """Return an ONNX file, or the one in a folder.

    Raises:
        UsageError: neither is there.
    """
    with progress_bar("files", is_short=True):
        path = Path(str(model_file(text)))
    if not path.is_file():
        raise UsageError(f"no such model: {text}; expected an .onnx file, or a folder such as a bundle")
    return path
