"""The digit scans, their fixed split and their way into a model.

::

    1,797 scans --split--+--> 599 evaluation images: never trained on, nothing chosen on them
                         +--> 1,198 training images: the first 512, unlabelled, are the calibration data
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samples.digits import PREPROCESSING, SIDE

HERE = Path(__file__).parent
HELD_OUT = 599
SEED = 0


def scans() -> tuple[np.ndarray, np.ndarray]:
    """All of scikit-learn's ``load_digits``: images uint8 (1797, 8, 8, 1), 0 to 255, and labels int64 (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.round(data.images / 16 * 255).astype(np.uint8)[..., None], data.target.astype(np.int64)


def split(labels: np.ndarray, held_out: int = HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """Positions in ``labels`` (training, held out): stratified, seed 0, the same at every call."""
    from sklearn.model_selection import train_test_split

    training, held = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=SEED)
    return training, held


def prepare(images: np.ndarray) -> Tensor:
    """Images uint8 (N, 8, 8, 1) to the model's input, float32 (N, 1, 8, 8)."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (scaled - PREPROCESSING["mean"][0]) / PREPROCESSING["std"][0]


def augment(x: Tensor) -> Tensor:
    """Shift each image of (N, 1, 8, 8) by -1, 0 or 1 pixel along each axis, mostly by 0, and add noise."""
    moves = torch.randint(-1, 2, (2, len(x))) * torch.randint(0, 2, (2, len(x))) + 1
    windows = F.pad(x, (1, 1, 1, 1), value=float(x.min())).unfold(2, SIDE, 1).unfold(3, SIDE, 1)
    return windows[torch.arange(len(x)), :, moves[0], moves[1]] + 0.1 * torch.randn_like(x)


def write() -> None:
    """Store the evaluation third, and 512 unlabelled training images for calibration; the same bytes every time."""
    images, labels = scans()
    training, held = split(labels)
    np.savez(HERE / "digits_eval.npz", images=images[held], labels=labels[held])
    np.savez(HERE / "digits_calib.npz", images=images[training[:512]])
