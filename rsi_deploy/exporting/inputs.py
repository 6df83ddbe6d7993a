"""The settings of an export, made into what its steps take, or refused before any work."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.dataset import UndecidedData
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, open_undecided
from rsi_deploy.data.text_files import SUFFIXES as TEXT_SUFFIXES
from rsi_deploy.runtime.feeds.user_feeds import read_feeds
from rsi_deploy.torch_models.model_source import Source, load_source, source_of_module

Shape = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The model's source, and how it becomes dense ONNX.

    Attributes:
        model: MODEL of `export`.
        weights: torchvision's weights: "DEFAULT", "none" or a file.
        checkpoint: state dict of a factory.
        shape: shape of the one input, where a torch model does not fix it.
        seed: random seed for random weights.
        preprocessing: fields that replace the model's own.
        opset: opset of the dense model; None is the exporter's, or an ONNX file's own.
        folder: folder of the user's model, if `model` is a copy of it; None if `model` is the user's own.
    """

    model: str | nn.Module
    weights: str
    checkpoint: str | Path | None
    shape: Shape | None
    seed: int
    preprocessing: Preprocessing | None
    opset: int | None
    folder: Path | None = None

    def load(self) -> Source:
        """Load the model.

        Raises:
            UsageError: no such model, or options that do not belong to it.
            ModelError: the model cannot be read.
        """
        if not isinstance(self.model, str):
            return source_of_module(self.model, self.shape, self.seed)
        source = load_source(
            self.model, weights=self.weights, checkpoint=self.checkpoint, input_shape=self.shape, seed=self.seed
        )
        source.folder = self.folder or source.folder
        return source

    def over(self, own: Preprocessing | None) -> Preprocessing | None:
        """Return the model's own preprocessing with the fields that were set."""
        return self.preprocessing.over(own) if self.preprocessing else own


def input_feeds(feeds: str | Feeds | None) -> Feeds | None:
    """Return the arrays of `--feeds`; None without."""
    return None if feeds is None else read_feeds(feeds) if isinstance(feeds, str) else dict(feeds)


def evaluation_data(data: str | Path | Dataset | None, preprocessing: Preprocessing | None) -> Dataset | None:
    """Open the labelled data.

    Raises:
        UsageError: no labels, or ready inputs together with a preprocessing.
    """
    if isinstance(data, str | Path) and Path(data).suffix in TEXT_SUFFIXES:
        raise UsageError(
            f"--data {data} is text, which has no labels; give it as --calib, or to eval with a --reference"
        )
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
    """Return the device that computes factors.

    Raises:
        UsageError: no such device, or none here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; type --device cpu")
    return torch.device(name)
