"""Real networks as written ONNX models, each with calibration data to draw from and separate test data.

    mlp_mnist     the first 1,024 MNIST test images (no others are here)    the other 8,976         top-1
    cnn_cifar10   1,024 of 2,000 CIFAR-10 training images                   2,000 test images       top-1
    resnet20, 56  the same                                                  the same                top-1
    lite0         250 ImageNet images                                       250 of other classes    top-1
    minilm        300 texts (`bench.texts`) of 64 tokens                    600 others              cosine, neighbours

A draw depends on its number alone. Only `Case.score` uses the test data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import nn

import graph_passes as gp
from bench import models, texts
from rsi_deploy.core.model_size import Size
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData, open_data
from rsi_deploy.io.onnx_file import file_bytes, write_external
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.runtime.sessions import make_session, run_session
from rsi_deploy.runtime.shape_trace import trace_run
from rsi_deploy.torch_models.model_source import Source, load_source, source_of_module
from rsi_deploy.torch_models.to_onnx import to_onnx

Array = npt.NDArray[Any]
Inputs = dict[str, Array]

BATCH = 32
"""Calibration samples a batch, as `rsi_deploy.calibration.calibration_data` takes them."""
TEST_BATCH = 250
IMAGES, TEXTS, TEST_TEXTS = 1024, 300, 600
TOKENS = 64
NEIGHBOURS = 10
NETS = ("mlp_mnist", "cnn_cifar10", "resnet20", "resnet56", "lite0", "minilm")


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a model is: `value` in points of 100 (top-1, or cosine to the dense embedding), `overlap` in 0 to 1."""

    value: float
    overlap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One dense network on disk, with its data.

    Attributes:
        name: one of `NETS`.
        path: the dense ONNX model, BatchNorms folded.
        pool: input name -> samples to draw calibration data from.
        size: samples a draw.
        apart: whether draws share no sample, which limits their number.
        test: input name -> test samples.
        reference: labels int64 `(N,)`, or the dense unit embeddings `(N, dim)`.
        digest: sha256 of the texts, for the encoder.
    """

    name: str
    path: Path
    pool: Inputs
    size: int
    apart: bool
    test: Inputs
    reference: Array
    digest: str = ""

    @property
    def available(self) -> int:
        """Samples in the pool."""
        return len(next(iter(self.pool.values())))

    @property
    def draws(self) -> int | None:
        """The number of different draws; None for any number."""
        if self.apart or self.size == self.available:
            return self.available // self.size
        return None

    def draw(self, number: int) -> Inputs:
        """Calibration data: without repetition, from a shuffled pool."""
        if self.apart:
            rows = np.arange(number * self.size, (number + 1) * self.size)
        else:
            rows = np.random.default_rng(number).permutation(self.available)[: self.size]
        return {name: array[rows] for name, array in self.pool.items()}

    def streams(self, draw: int) -> OnnxStreams:
        """The streams of calibration, on one draw."""
        data = self.draw(draw)
        return OnnxStreams(self.path, lambda: batches(data, BATCH), self.size, macs=self.macs(self.path), seed=draw)

    def macs(self, model: Path) -> dict[str, int]:
        """Multiply-accumulates a sample, by node."""
        two = {name: array[:2] for name, array in self.pool.items()}
        return {node: count // 2 for node, count in trace_run(model, two).macs.items()}

    def measured(self, model: Path) -> Size:
        """Measure the size and cost of a written model."""
        return Size(
            bytes=file_bytes(model), params=gp.count_parameters(ir.load(model)), macs=sum(self.macs(model).values())
        )

    def score(self, model: Path) -> Score:
        """Judge a model by the test data."""
        outputs = outputs_of(model, self.test)
        if self.reference.ndim == 1:
            return Score(value=100 * float((outputs.argmax(axis=1) == self.reference).mean()))
        cosine = float((outputs * self.reference).sum(axis=1).mean())
        return Score(value=100 * cosine, overlap=neighbour_overlap(outputs, self.reference))


def load(name: str, folder: Path, *, size: int | None = None, limit: int | None = None) -> Case:
    """Export the net `name` into `folder` and load its data.

    Args:
        name: one of `NETS`.
        folder: where the dense model and all temporary ones are written.
        size: calibration samples of a draw; None for the usual number.
        limit: number of test samples, evenly spaced.

    Raises:
        UnavailableError: weights, data or a package are not on this machine.
    """
    if name == "minilm":
        return _encoder(folder, min(size or TEXTS, TEXTS), limit)
    module = models.lite0() if name == "lite0" else models.trained(name)
    shape: Any = module.input_shape
    steps: Any = module.preprocessing
    path = folder / f"{name}.onnx"
    write_dense(source_of_module(module, shape), path)
    (key,) = (value.name for value in make_session(path).get_inputs())
    if name == "mlp_mnist":
        images, labels = _images(models.mnist_test(), steps)
        pool, images, labels = images[:IMAGES], images[IMAGES:], labels[IMAGES:]
    elif name == "lite0":
        drawn, judged = models.imagenet_sample()
        pool, (images, labels) = _images(drawn, steps)[0], _images(judged, steps)
    else:
        pool, _ = _images(open_data(models.DATA_ROOT / "cifar10" / "train_2000.npz"), steps)
        images, labels = _images(models.cifar10_test(), steps)
    rows = _spaced(len(labels), limit)
    return Case(
        name=name,
        path=path,
        pool={key: pool},
        size=min(size or IMAGES, IMAGES, len(pool)),
        apart=False,
        test={key: images[rows]},
        reference=labels[rows],
    )


def _encoder(folder: Path, size: int, limit: int | None) -> Case:
    path = folder / "minilm.onnx"
    write_dense(source_of_module(models.minilm(TOKENS)), path)
    found = texts.harvest()
    test, rest = texts.parted(found, TEST_TEXTS)
    judged = [test[index] for index in _spaced(len(test), limit)]
    inputs = _tokens(judged)
    return Case(
        name="minilm",
        path=path,
        pool=_tokens(rest),
        size=size,
        apart=True,
        test=inputs,
        reference=outputs_of(path, inputs),
        digest=texts.digest(found),
    )


def untrained(name: str, folder: Path, shape: tuple[int, ...]) -> Case:
    """Return a net of torchvision with random weights and random calibration images `shape`, without test data."""
    path = folder / f"{name}.onnx"
    write_dense(load_source(f"torchvision:{name}", weights="none"), path)
    (key,) = (value.name for value in make_session(path).get_inputs())
    return untested(path, {key: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)})


def tiny(folder: Path) -> Case:
    """Return a Conv and a Linear with random weights and inputs: calibrating them loads all libraries of a process.

    The model is written unless `folder` holds it.
    """
    path = folder / "tiny.onnx"
    if not path.exists():
        module = nn.Sequential(nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 40)).eval()
        write_dense(source_of_module(module, (1, 4, 4, 4)), path)
    (key,) = (value.name for value in make_session(path).get_inputs())
    return untested(path, {key: np.random.default_rng(0).standard_normal((64, 4, 4, 4), dtype=np.float32)})


def untested(path: Path, pool: Inputs) -> Case:
    """Return a case whose samples are all calibration data."""
    size = len(next(iter(pool.values())))
    return Case(name=path.stem, path=path, pool=pool, size=size, apart=False, test={}, reference=np.zeros(0))


def batches(inputs: Mapping[str, Array], size: int) -> Iterator[Inputs]:
    """The samples, `size` at a time."""
    count = len(next(iter(inputs.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in inputs.items()}


def outputs_of(model: Path, inputs: Mapping[str, Array]) -> Array:
    """The model's first output on all samples, `(N, ...)`."""
    session = make_session(model)
    return np.concatenate([run_session(session, batch, model.name)[0] for batch in batches(inputs, TEST_BATCH)])


def neighbour_overlap(embeddings: Array, reference: Array, count: int = NEIGHBOURS) -> float:
    """Mean share of each sample's `count` nearest others that are the same in both, by cosine of unit rows.

    Example:
        >>> corners = np.eye(2)[[0, 0, 1, 1]] + [[0, 0.1], [0, 0], [0.1, 0], [0, 0]]
        >>> neighbour_overlap(corners, corners, 1), neighbour_overlap(corners[[0, 2, 1, 3]], corners, 1)
        (1.0, 0.0)
    """

    def nearest(rows: Array) -> Array:
        similar = rows @ rows.T
        np.fill_diagonal(similar, -np.inf)
        return np.argsort(-similar, axis=1, kind="stable")[:, :count]

    pairs = zip(nearest(embeddings).tolist(), nearest(reference).tolist(), strict=True)
    return float(np.mean([len(set(one) & set(other)) / count for one, other in pairs]))


def write_dense(source: Source, path: Path, opset: int | None = None) -> None:
    """Write the dense ONNX model that an export of the source would compress."""
    model = to_onnx(source, opset=opset).model
    gp.FoldBatchNormPass()(model)
    write_external(model, path)


def _images(data: Any, steps: Preprocessing) -> tuple[Array, Array]:
    assert isinstance(data, ArrayData)
    ((inputs, labels),) = data.batches(len(data), steps)
    assert labels is not None
    return inputs, labels


def _tokens(found: Any) -> Inputs:
    ids, mask = models.tokenize(found, TOKENS)
    return {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}


def _spaced(count: int, limit: int | None) -> Array:
    number = min(count, limit or count)
    return np.arange(number) * count // number
