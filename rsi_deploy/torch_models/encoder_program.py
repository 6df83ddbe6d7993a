"""python -m rsi_deploy.torch_models.encoder_program FOLDER TARGET: make an ONNX model of an encoder of transformers.

The class is the one that config.json names, so a classifier keeps its head; AutoModel where it names none. Inputs are
`input_ids`, `attention_mask`, and `token_type_ids` where the model has several types, int64 `(batch, tokens)`. Outputs
are those of the class: `last_hidden_state` and `pooler_output`, `logits`, and so on. `rsi_deploy.io.folders.conversion`
runs this program; transformers runs none of the folder's own code.
"""

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.folders.transformers_folder import TOKENIZERS
from rsi_deploy.io.onnx_file import write_onnx
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.torch_models.model_source import Source, no_torch_logs
from rsi_deploy.torch_models.to_onnx import rename_axis_, to_onnx

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SHAPES = ((2, 12), (3, 7), (1, 1))
"""Rows and tokens of the example, and of the batches on which the ONNX model is compared with torch."""
LARGEST_ERROR = 1e-3
"""Largest difference from torch, relative to the largest value of an output."""


def main(source: str, target: str) -> None:
    """Write `target`/model.onnx, and tokenizer.json where the folder's tokenizer has another format.

    Raises:
        ModelError: The class is unknown, takes no tokens, or cannot be exported.
    """
    folder = Path(source)
    encoder = Encoder(_loaded(folder))
    write_onnx(encoder.exported(), Path(target) / "model.onnx")
    encoder.check(Path(target) / "model.onnx")
    if not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in TOKENIZERS):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(target)


class Encoder(nn.Module):
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
            raise ModelError(f"{type(model).__name__} takes no input_ids", hint="export it to ONNX yourself")
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
        rename_axis_(model, 1, "tokens")
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
                if got.shape != right.shape or not np.allclose(
                    got, right, rtol=0, atol=LARGEST_ERROR * np.abs(right).max()
                ):
                    raise ModelError(
                        f"{name} of the ONNX model differs from torch's for {shape[0]} x {shape[1]} tokens",
                        hint="export the model to ONNX yourself",
                    )


def _loaded(folder: Path) -> Any:
    """Return the model of a folder in float32."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = next(iter(config.architectures or ()), "AutoModel")
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ModelError(f"transformers has no class {name}", hint="export the model to ONNX yourself")
    return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


if __name__ == "__main__":
    main(*sys.argv[1:])
