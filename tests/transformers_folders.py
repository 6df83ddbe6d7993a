"""Tiny folders of transformers with random weights: decoders and encoders of many architectures beside a tokenizer."""

import json
import traceback

import pytest
import text_models
from generating_models import run_here

ROWS = 300
TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2}
WIDE = GROUPED | {"head_dim": 16}
ENCODER = SMALL | {"max_position_embeddings": 64, "initializer_range": 0.2}
DISTILLED = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
OPT = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}

DECODERS = {
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", WIDE),
    "Gemma": ("GemmaForCausalLM", WIDE),
    "Gemma2": ("Gemma2ForCausalLM", WIDE | {"query_pre_attn_scalar": 16, "tie_word_embeddings": False}),
    "Phi": ("PhiForCausalLM", GROUPED | {"num_attention_heads": 2}),
    "Phi3": ("Phi3ForCausalLM", GROUPED | {"original_max_position_embeddings": 128}),
    "SmolLM3": ("SmolLM3ForCausalLM", GROUPED),
}
ENCODERS = {
    "Bert": ("BertModel", ENCODER),
    "DistilBert": (
        "DistilBertModel",
        {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "initializer_range": 0.2},
    ),
    "Roberta": ("RobertaForSequenceClassification", ENCODER | {"num_labels": 5, "type_vocab_size": 1}),
    "Electra": ("ElectraModel", ENCODER | {"embedding_size": 32}),
}
NOT_TAKEN = {
    "Olmo": ("OlmoForCausalLM", GROUPED),  # made with a norm that is another one
    "GPT2": ("GPT2LMHeadModel", GPT),
    "GPTNeoX": ("GPTNeoXForCausalLM", SMALL | {"max_position_embeddings": 128}),
    "OPT": ("OPTForCausalLM", OPT),
}


def made(name, seed=0, **settings):
    """Return a model with random weights, norms and biases among them."""
    import torch
    import transformers

    kind, size = (DECODERS | ENCODERS | NOT_TAKEN)[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{"vocab_size": ROWS} | TOKENS | size | settings)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def write_folder(folder, model, tokenizer=True, **how):
    """Write the folder of a model as transformers does; return the folder."""
    model.save_pretrained(folder, **how)
    if tokenizer:
        words = [f"w{number}" for number in range(ROWS - 4)]
        text_models.write_tokenizer(folder, words, ends=False)
        names = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "bos_token": "[CLS]",
        }
        names["eos_token"] = "[SEP]"
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def change_config(folder, **values):
    """Set values of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def in_process(monkeypatch):
    """Run converters in this process; return the list of the modules that ran."""
    ran = []

    def run_program(module, arguments, log):
        ran.append(module)
        try:
            run_here(module, arguments)
        except Exception:
            log.write_text(traceback.format_exc())
            return 1
        return 0

    monkeypatch.setattr("rsi_deploy.io.folders.conversion.run_program", run_program)
    return ran
