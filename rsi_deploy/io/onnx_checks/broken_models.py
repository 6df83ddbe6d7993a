"""Report models that are not valid ONNX with the message of onnx's checker.

The checker runs only after a failure: it refuses some models that work, and it is slow on large ones.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import onnx

from rsi_deploy.core.errors import ModelError, RsiDeployError
from rsi_deploy.io.limits import first_line
from rsi_deploy.io.model_folder import model_file

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checker_error(path: Path) -> Exception | None:
    """Return the error of onnx's checker with shape inference on a file that `onnx_reader` has accepted; else None."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference have no common base
        return error
    return None


@contextmanager
def explaining_broken_model(model: object) -> Iterator[None]:
    """Raise ModelError where the block fails on an invalid ONNX file: `model`, if it is a path of one.

    A failure on a valid file is a bug and passes through with its traceback.
    """
    try:
        yield
    except (RsiDeployError, OSError, MemoryError):
        raise
    except Exception as error:
        path = _path(model)
        against = checker_error(path) if path is not None and path.suffix == ".onnx" and path.is_file() else None
        if path is None or against is None:
            raise
        raise ModelError(
            f"{path.name} is not valid ONNX: {first_line(against)} (found after {type(error).__name__}: "
            f"{first_line(error)})",
            hint="export the model again",
        ) from error


def _path(model: object) -> Path | None:
    """Return the file of a model, also of one that is a folder."""
    try:
        return Path(str(model_file(str(model)))) if isinstance(model, str | Path) else None
    except RsiDeployError:
        return None


def explains_broken_models(verb: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function, whose first argument is a model, within `explaining_broken_model`."""

    @functools.wraps(verb)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with explaining_broken_model(args[0] if args else kwargs.get("model", kwargs.get("source"))):
            return verb(*args, **kwargs)

    return wrapped
