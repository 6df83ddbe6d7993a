"""Models that are not valid ONNX: what onnx's checker says of them, where something of ours has failed on one.

The checker is not asked before: it refuses models that run all the same, and takes its time on large ones.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import onnx

from rsi_deploy.core.errors import ModelError, RsiDeployError
from rsi_deploy.io.limits import first_line

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def objection(path: Path) -> Exception | None:
    """What onnx's checker, with shape inference, has against a file; it was read by the gateway before."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference have no common base
        return error
    return None


def explains_broken_models(verb: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have a function of a model, its first argument, end in a ModelError where it fails on an invalid ONNX file.

    A failure on a valid one is passed on: that is a bug, and its traceback is wanted.
    """

    @functools.wraps(verb)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return verb(*args, **kwargs)
        except (RsiDeployError, OSError, MemoryError):
            raise
        except Exception as error:
            model = args[0] if args else kwargs.get("model", kwargs.get("source"))
            path = Path(model) if isinstance(model, str | Path) else None
            against = objection(path) if path is not None and path.suffix == ".onnx" and path.is_file() else None
            if path is None or against is None:
                raise
            raise ModelError(
                f"{path.name} is not valid ONNX: {first_line(against)} (found after {type(error).__name__}: "
                f"{first_line(error)}); export the model again"
            ) from error

    return called
