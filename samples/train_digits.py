"""Train a digit sample or measure it: ``python -m samples.train_digits cnn|vit [--validate|--evaluate-only]``.

The ordinary way: AdamW, one learning-rate cycle, small shifts and noise, dropout, label smoothing; nothing here knows
of compression. It sees the 1,198 images outside the evaluation third; ``--validate`` holds out 300 of those instead.
"""

import argparse
import math

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from samples import digits, digits_data

SETTINGS = {"cnn": {"rate": 2e-3, "decay": 0.3}, "vit": {"rate": 1e-3, "decay": 0.5}}
EPOCHS, BATCH = 100, 32


def train(model: nn.Module, x: Tensor, y: Tensor, rate: float, decay: float) -> None:
    """Fit ``model`` to inputs (N, 1, 8, 8) and labels (N,); the same weights on the same machine."""
    steps = EPOCHS * math.ceil(len(y) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(y)).split(BATCH):
            loss = F.cross_entropy(model(digits_data.augment(x[index])), y[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent, of inputs (N, 1, 8, 8) and labels (N,)."""
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


def main() -> None:
    """Train and store the weights and the data, or only measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SETTINGS))
    parser.add_argument("--validate", action="store_true", help="try the settings, store nothing")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the stored weights")
    arguments = parser.parse_args()
    images, labels = digits_data.scans()
    training, held_out = digits_data.split(labels)
    if arguments.validate:
        training, held_out = (training[part] for part in digits_data.split(labels[training], 300))
    x, y = digits_data.prepare(images), torch.from_numpy(labels)

    torch.set_num_threads(1)
    torch.manual_seed(digits_data.SEED)
    model: nn.Module = getattr(digits, arguments.name)()
    path = digits_data.HERE / f"digits_{arguments.name}.safetensors"
    if arguments.evaluate_only:
        model.load_state_dict(load_file(path))
    else:
        train(model, x[training], y[training], **SETTINGS[arguments.name])
    if not (arguments.validate or arguments.evaluate_only):
        save_file(model.state_dict(), path)
        digits_data.write()
    print(f"{arguments.name}: {accuracy(model, x[held_out], y[held_out]):.2f} % top-1 on {len(held_out)} images")


if __name__ == "__main__":
    main()
