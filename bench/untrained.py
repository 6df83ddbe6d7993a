"""Nets of real sizes with random weights, for benches of time: values change no time, and no file is needed.

    minilm             all-MiniLM-L6-v2: a text of 64 tokens to a unit vector
    smollm2_prefill    SmolLM2-135M: a prompt of 256 tokens to the logits of the next one
    smollm2_decode     the same, one token behind a cache of 256: its logits, and its keys and values
    resnet20, ...      the small nets of `bench.models`
    vgg19, ...         every classifier of torchvision

`python -m bench.untrained FOLDER NAME...` writes them as dense ONNX models, several at a time. Where a bench takes
`--dense FOLDER`, it finds them there.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import cases, common, models
from bench.models import SentenceEncoder, need
from rsi_deploy.torch_models.model_source import load_source, source_of_module

TOKENS, CACHED = 64, 256
TRANSFORMERS = ("minilm", "smollm2_prefill", "smollm2_decode")
SMALL = ("mlp_mnist", "cnn_cifar10", "resnet20", "resnet56")
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


class Prefill(nn.Module):
    """A causal language model: token ids int64 `(N, length)` to the logits `(N, vocabulary)` of the next token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """Token ids `(2, CACHED)`."""
        return (torch.full((2, CACHED), 2000),)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `(N, vocabulary)`."""
        logits: Tensor = self.model(input_ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, 0]


class Decode(nn.Module):
    """The same for one token behind a cache: its logits, and its keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """A token `(2, 1)`, and keys and values `(2, layers, 2, heads, CACHED, width)`."""
        heads, width = SMOLLM2["num_key_value_heads"], SMOLLM2["hidden_size"] // SMOLLM2["num_attention_heads"]
        return torch.full((2, 1), 2000), torch.zeros(2, SMOLLM2["num_hidden_layers"], 2, heads, CACHED, width)

    def forward(self, input_ids: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(N, vocabulary)`, and keys and values `(N, layers, 2, heads, 1, width)` of the token."""
        from transformers import DynamicCache

        past = DynamicCache()
        for layer in range(cache.shape[1]):
            past.update(cache[:, layer, 0], cache[:, layer, 1], layer)
        found = self.model(input_ids, past_key_values=past, use_cache=True)
        new = [torch.stack([layer.keys[:, :, -1:], layer.values[:, :, -1:]], 1) for layer in past.layers]
        return found.logits[:, 0], torch.stack(new, 1)


def transformer(name: str) -> nn.Module:
    """Return a net of `TRANSFORMERS`, which declares its inputs.

    Raises:
        UnavailableError: the package transformers is not installed.
    """
    need("transformers", "transformers")
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    if name == "minilm":
        return SentenceEncoder(BertModel(BertConfig(**MINILM), add_pooling_layer=False), TOKENS)
    model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    return Prefill(model) if name == "smollm2_prefill" else Decode(model)


def written(name: str, folder: Path, opset: int | None = None) -> Path:
    """Return the dense ONNX model of a net in a folder, and write it unless it is there.

    Raises:
        UnavailableError: the package transformers is not installed.
        UsageError: torchvision has no net of that name.
    """
    path = folder / (f"{name}.onnx" if opset is None else f"{name}.opset{opset}.onnx")
    if path.exists():
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in TRANSFORMERS:
            source = source_of_module(transformer(name).requires_grad_(False))
        elif name in SMALL:
            source = source_of_module(getattr(models, name)().requires_grad_(False))
        else:
            source = load_source(f"torchvision:{name}", weights="none")
    cases.write_dense(source, path, opset)
    return path


def main(arguments: Sequence[str]) -> int:
    """Write dense models and return 0, or 1 if one cannot be written."""
    options = argparse.ArgumentParser(prog="python -m bench.untrained", description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("nets", nargs="+", metavar="NAME")
    args = options.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    if len(args.nets) == 1:
        try:
            written(args.nets[0], args.folder)
        except common.UnavailableError as reason:
            print(reason, file=sys.stderr)
            return 1
        return 0

    def failed(net: str) -> bool:
        return bool(subprocess.run([sys.executable, "-m", "bench.untrained", args.folder, net], check=False).returncode)

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        absent = [net for net, is_absent in zip(args.nets, pool.map(failed, args.nets), strict=True) if is_absent]
    print(f"not written: {', '.join(absent)}" if absent else f"{len(args.nets)} models are written", flush=True)
    return int(bool(absent))


if __name__ == "__main__":
    common.run(main)
