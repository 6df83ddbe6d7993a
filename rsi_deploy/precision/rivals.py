"""Rivals: the dense model as onnxruntime's own tools quantize it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.precision.quantizers import FeedsSource, quantize
from rsi_deploy.precision.schemes import DYNAMIC, FLOAT16, PRODUCTS, WEIGHTS4, Scheme
from rsi_deploy.precision.targets import ANY, ProviderTarget
from rsi_deploy.runtime.sessions import make_session


def rival_schemes(operators: Collection[str], provider: str, target: ProviderTarget = ANY) -> list[Scheme]:
    """Return the schemes that onnxruntime offers for a model.

    Args:
        operators: types of the operators that have weights.
        provider: short name of the execution provider. float16 pays on CUDA and on some targets.
        target: provider that will run the model; limits the schemes.
    """
    schemes = [FLOAT16] if provider == "cuda" or target.pays_float16 else []
    schemes.append(target.static("minmax"))
    if PRODUCTS & set(operators):
        schemes += [DYNAMIC, WEIGHTS4]
    return [scheme for scheme in schemes if scheme.kind in target.kinds]


def rival_name(scheme: Scheme) -> str:
    """Return the name of a rival for users."""
    return f"onnxruntime's {scheme.name}"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """The dense model, quantized by onnxruntime's own tools.

    Attributes:
        scheme: how it is quantized.
        path: its file; None where onnxruntime could not make or load it.
        error: its message then; "" otherwise.
    """

    scheme: Scheme
    path: Path | None
    error: str = ""

    @property
    def name(self) -> str:
        """Name for users."""
        return rival_name(self.scheme)


def make_rivals(
    source: Path, folder: Path, schemes: Collection[Scheme], feeds: FeedsSource | None, provider: str = "cpu"
) -> Iterator[Rival]:
    """Yield a model in each scheme; one that cannot be made or loaded holds the error.

    Args:
        source: dense model in float32.
        folder: folder of the files.
        schemes: how to quantize.
        feeds: function that returns calibration batches, for static ranges.
        provider: execution provider that has to load the models.
    """
    for scheme in schemes:
        path = folder / f"rival-{scheme.kind.replace(' ', '-')}.onnx"
        try:
            quantize(source, path, scheme, feeds)
            make_session(path, provider)
        except (ModelError, UsageError) as error:
            yield Rival(scheme=scheme, path=None, error=str(error))
        else:
            yield Rival(scheme=scheme, path=path)
