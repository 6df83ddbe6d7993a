"""python -m rsi_deploy.torch_models.transformers_program KIND FOLDER TARGET: make an ONNX model of one of transformers.

Run by `rsi_deploy.io.folders.conversion`; none of the folder's own code runs.

    decoder   by onnxruntime-genai's builder, in float32, with caches that grow
    encoder   by torch's exporter

An encoder's class is the one that config.json names, so a classifier keeps its head; AutoModel where it names none. Its
inputs are `input_ids`, `attention_mask`, and `token_type_ids` where it has several types, int64 `(batch,
sequence_length)`; its outputs those of the class: `last_hidden_state` and `pooler_output`, `logits`, and so on.

Either is compared with transformers before it counts: the builder makes some architectures wrongly (OLMo in 0.18).
"""

import gc
import inspect
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Array
from rsi_deploy.io.folders.config import MODEL
from rsi_deploy.io.folders.transformers_folder import TOKENIZERS
from rsi_deploy.io.onnx_file import write_onnx
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.sessions import make_session, run_session
from rsi_deploy.torch_models.model_source import Source, no_torch_logs
from rsi_deploy.torch_models.to_onnx import rename_axis_, to_onnx

BUILDER = "onnxruntime_genai.models.builder"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SHAPES = ((2, 12), (3, 7), (1, 1))
"""Rows and tokens of the example, and of the batches on which an ONNX encoder is compared with torch."""
LARGEST_ERROR = 1e-3
"""Largest difference from torch, relative to the largest value of an output."""


def main(kind: str, source: str, target: str) -> None:
    """Write `target`/model.onnx and what belongs to it.

    Args:
        kind: "decoder" or "encoder".
        source: folder of transformers.
        target: folder, which exists.

    Raises:
        ModelError: The model cannot be converted, or the ONNX model differs from it.
    """
    (convert_decoder if kind == "decoder" else convert_encoder)(Path(source), Path(target))


def convert_decoder(source: Path, target: Path) -> None:
    """Run the builder, and compare the logits of a prefill and of a decode step.

    Raises:
        ModelError: They differ. The builder raises anything.
    """
    words = ["-i", source, "-o", target, "-p", "fp32", "-e", "cpu", "-c", target.parent / "work"]
    sys.argv = [BUILDER, *map(str, words), "--extra_options", "windowed_kv_cache=false"]
    runpy.run_module(BUILDER, run_name="__main__")
    gc.collect()  # the builder's weights
    session = make_session(target / MODEL)
    names = [output.name for output in session.get_outputs()]
    caches = Caches.of(model_inputs(session, MODEL))
    if caches is None or caches.presents(names) is None:
        return  # of a layout that is not known, which export names
    model = _loaded(source)
    tokens = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = model(tokens).logits.numpy()
    del model
    feeds = caches.prefill(tokens[:, :-1].numpy())
    prefill: dict[str, Value] = dict(zip(names, run_session(session, feeds, MODEL), strict=True))
    last = run_session(session, caches.decode(feeds, prefill, tokens[:, -1:].numpy()), MODEL)
    made: Array = np.concatenate([prefill["logits"], dict(zip(names, last, strict=True))["logits"]], axis=1)
    _compare("the logits", made, right)


def convert_encoder(source: Path, target: Path) -> None:
    """Export an encoder, and write tokenizer.json where the folder's tokenizer has another format.

    Raises:
        ModelError: The class is unknown, takes no tokens, or cannot be exported, or the outputs differ.
    """
    encoder = TracedEncoder(_loaded(source))
    write_onnx(encoder.exported(), target / MODEL)
    encoder.check(target / MODEL)
    if not (source / "tokenizer.json").is_file() and any((source / name).is_file() for name in TOKENIZERS):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)


class TracedEncoder(nn.Module):
    """A model of transformers with positional inputs and a tuple of named outputs.

    Args:
        model: the model, in evaluation mode.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        taken = inspect.signature(model.forward).parameters
        types = getattr(model.config, "type_vocab_size", 0) or 0
        self.inputs = [name for name in INPUTS if name in taken and (name != "token_type_ids" or types > 1)]
        if "input_ids" not in self.inputs:
            raise ModelError(f"{type(model).__name__} takes no input_ids", hint="a model that reads text was expected")
        with torch.no_grad():
            found = model(**dict(zip(self.inputs, self.example(*SHAPES[0]), strict=True)), return_dict=True)
        self.outputs = [name for name, value in found.items() if isinstance(value, Tensor)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for the inputs, `(batch, tokens)` each."""
        found = self.model(**dict(zip(self.inputs, inputs, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)

    def example(self, rows: int, tokens: int) -> tuple[Tensor, ...]:
        """Return random inputs; the last row has padding at its end."""
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(self.model.config.vocab_size, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, tokens - tokens // 3 :] = 0
        made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return tuple(made[name] for name in self.inputs)

    def exported(self) -> Any:
        """Return the ONNX model, with any number of rows and tokens."""
        inputs = self.example(*SHAPES[0])
        axes = tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs)
        with no_torch_logs(), torch.no_grad():
            program = torch.export.export(self, inputs, dynamic_shapes=(axes,))
        source = Source(name=type(self.model).__name__, program=program, example_inputs=inputs)
        model = to_onnx(source).model
        rename_axis_(model, 1, "sequence_length")
        for value, name in zip(model.graph.inputs, self.inputs, strict=True):
            value.name = name
        for value, name in zip(model.graph.outputs, self.outputs, strict=True):
            value.name = name
        for name, value in list(model.graph.initializers.items()):
            value.name = name.removeprefix("model.")
        return model

    def check(self, path: Path) -> None:
        """Compare the ONNX model with torch on batches of several sizes, with padding.

        Raises:
            ModelError: They differ.
        """
        session = make_session(path)
        for shape in SHAPES:
            inputs = self.example(*shape)
            made = session.run(self.outputs, {n: x.numpy() for n, x in zip(self.inputs, inputs, strict=True)})
            with torch.no_grad():
                expected = [value.numpy() for value in self(*inputs)]
            for name, got, right in zip(self.outputs, made, expected, strict=True):
                _compare(f"{name} of {shape[0]} x {shape[1]} tokens", got, right)


def _loaded(folder: Path) -> Any:
    """Return the model of a folder in the type that its configuration names: float32, as `conversion` writes it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = next(iter(config.architectures or ()), "AutoModel")
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"transformers has no class {name}", hint="correct architectures in config.json")
    return kind.from_pretrained(folder, local_files_only=True).eval()


def _compare(name: str, made: Array, right: Array) -> None:
    """Refuse an output of the ONNX model that is not transformers'."""
    error = np.abs(made - right).max() / np.abs(right).max() if made.shape == right.shape else np.inf
    if not error <= LARGEST_ERROR:
        raise ModelError(
            f"{name} of the ONNX model differ from transformers' by {error:.2g} of the largest",
            hint=f"at most {LARGEST_ERROR:g} was expected",
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
