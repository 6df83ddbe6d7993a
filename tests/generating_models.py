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


def write_bytes_tokenizer(folder):
    """Write tokenizer.json of byte pairs, which genai reads (it does not read one of whole words); return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and the other dog"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_generating(folder, layers=2, seed=0, chat_template=None):
    """Write `folder`/hf as transformers does and `folder`/onnx as the builder does; return the latter.

    Args:
        folder: an existing folder.
        layers: number of layers.
        seed: random seed of the weights.
        chat_template: template in Jinja, for a tokenizer that genai reads; None writes a tokenizer of whole words.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source, target = folder / "hf", folder / "onnx"
    source.mkdir()
    if chat_template is None:
        write_tokenizer(source)
        rows, names = ROWS, {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    else:
        rows = write_bytes_tokenizer(source)
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    config = LlamaConfig(
        vocab_size=rows,
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
