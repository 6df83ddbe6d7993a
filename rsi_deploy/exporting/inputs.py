"""What an export is given, as a user types it: made into what its steps take, and refused before any work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import UndecidedData
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, open_undecided
from rsi_deploy.io.onnx_file import read_onnx
from rsi_deploy.planning.planner import MaxError, RankSpec, rank_spec
from rsi_deploy.runtime.feeds.shapes import named_shapes
from rsi_deploy.torch_models.model_source import Source, load_source, source_of_module

Shape = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the model is from, and how it becomes dense ONNX.

    Attributes:
        model: as `export` takes it.
        weights: torchvision's: "DEFAULT", "none" or a file.
        checkpoint: a factory's state dict.
        shape: of the one input, where a torch model does not tell.
        seed: of random weights.
        preprocessing: fields that go before what the model tells.
        opset: of the dense model; None is the exporter's, or an ONNX file's own.
    """

    model: str | nn.Module
    weights: str
    checkpoint: str | Path | None
    shape: Shape | None
    seed: int
    preprocessing: Preprocessing | None
    opset: int | None

    def load(self) -> Source:
        """The model, loaded.

        Raises:
            UsageError: no such model, or options that do not belong to it.
            ModelError: it cannot be read.
        """
        if not isinstance(self.model, str):
            return source_of_module(self.model, self.shape, self.seed)
        return load_source(
            self.model, weights=self.weights, checkpoint=self.checkpoint, input_shape=self.shape, seed=self.seed
        )

    def steps(self, source: Source) -> Preprocessing | None:
        """From 8-bit pictures to inputs: what was given, over what the model tells."""
        told = source.preprocessing
        if source.onnx is not None:
            told = Preprocessing.stored(read_onnx(source.onnx).metadata_props)
        return self.preprocessing.over(told) if self.preprocessing else told


def uniform(rank: str | int | RankSpec | None, max_error: str | MaxError | None) -> RankSpec | MaxError | None:
    """The rank or the error that is the same everywhere; None where something else decides.

    Example:
        >>> str(uniform("25%", None)), uniform("auto", None)
        ('25%', None)
    """
    given = None if rank == "auto" else rank
    if max_error is not None:
        return rank_spec(given, max_error)
    return None if given is None else RankSpec.parse(given)


def told_shapes(given: Shape | Sequence[str] | None) -> tuple[Shape | None, dict[str, Any]]:
    """The one shape of a torch model's input, and those told by name.

    Example:
        >>> told_shapes("1x3x32x32"), told_shapes((1, 8)), told_shapes(["ids=1x128"])
        (('1x3x32x32', {}), ((1, 8), {}), (None, {'ids': (1, 128)}))
    """
    texts = [given] if isinstance(given, str) else [s for s in given or () if isinstance(s, str)]
    sizes = tuple(s for s in given or () if isinstance(s, int))
    plain: Shape | None = next((t for t in texts if "=" not in t), None) or sizes or None
    return plain, dict(named_shapes([text for text in texts if "=" in text]))


def evaluation_data(data: str | Path | Dataset | None, preprocessing: Preprocessing | None) -> Dataset | None:
    """The labelled data, opened.

    Raises:
        UsageError: no labels, or ready inputs where a preprocessing was given.
    """
    dataset = open_undecided(data) if isinstance(data, str | Path) else data
    if dataset is None or isinstance(dataset, UndecidedData):
        return dataset  # the model's inputs decide
    if dataset.labels is None:
        raise UsageError("--data has no labels; evaluation data need them (`labels` or `y`, or class folders)")
    if dataset.kind != "images" and preprocessing is not None:
        raise UsageError(
            "--data are ready model inputs: no preprocessing applies; leave out --mean, --std, --resize, --crop "
            "and --layout, or give 8-bit images"
        )
    return dataset


def device_named(name: str) -> torch.device:
    """Where factors are computed.

    Raises:
        UsageError: no such device, or none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; type --device cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, but got {name!r}")
    return torch.device(name)
