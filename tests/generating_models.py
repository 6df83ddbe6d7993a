"""Tiny folders of onnxruntime-genai: a random Llama of transformers, made ONNX by genai's own builder, offline."""

import contextlib
import importlib.util
import io
import json
import os
import runpy
import sys
from unittest import mock

import pytest
from text_models import ROWS, write_tokenizer

CONTEXT = 256
has_genai = importlib.util.find_spec("onnxruntime_genai") is not None
needs_genai = pytest.mark.skipif(not has_genai, reason="pip install onnxruntime-genai")


def write_generating(folder, layers=2, seed=0):
    """Write `folder`/hf as transformers does and `folder`/onnx as the builder does; return the latter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source, target = folder / "hf", folder / "onnx"
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=96,  # the builder takes a layer of as many outputs as tokens for the head
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(source)
    write_tokenizer(source)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    run_here(
        "onnxruntime_genai.models.builder",
        ["-i", str(source), "-o", str(target), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")],
    )
    return target


def run_here(module, arguments):
    """Run a module as a program in this process, offline and silent: importing torch and transformers takes seconds."""
    silent = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *arguments]),
        mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
        contextlib.redirect_stdout(silent),
        contextlib.redirect_stderr(silent),
    ):
        runpy.run_module(module, run_name="__main__")


def changed(folder, target, **model):
    """Copy a folder with other values in the model of genai_config.json; None removes one."""
    import shutil

    shutil.copytree(folder, target)
    found = json.loads((target / "genai_config.json").read_text())
    found["model"] = {name: value for name, value in (found["model"] | model).items() if value is not None}
    (target / "genai_config.json").write_text(json.dumps(found))
    return target
