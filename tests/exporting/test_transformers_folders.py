"""Folders of transformers: converted once, equal to transformers at full rank, and refused where they cannot be."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import text_models
from generating_models import has_genai, needs_genai
from transformers_folders import DECODERS, ENCODERS, NOT_TAKEN, ROWS, change_config, in_process, made, write_folder

from rsi_deploy.core.cache_folder import cache_folder
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.evaluation.greedy import greedy_tokens
from rsi_deploy.exporting.api import export
from rsi_deploy.io.folders import conversion
from rsi_deploy.io.folders.conversion import onnx_folder
from rsi_deploy.io.model_folder import find_model
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.sessions import make_session

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="needs rsi-deploy[hf]")
__all__ = ["in_process"]

STEPS, LIMIT = 16, 1e-3
FULL = {"rank": "100%", "always_split": True, "keep_dense": True, "measure": False}
PROMPTS = np.random.default_rng(0).integers(4, ROWS, (2, 9))


def error(made_values, right):
    """Largest difference, relative to the largest value."""
    right = np.asarray(right)
    assert made_values.shape == right.shape
    return np.abs(made_values - right).max() / np.abs(right).max()


def decoded(path, tokens, prefix):
    """Logits of a decoder: those of a prefix, and of the next token through the caches."""
    session = make_session(path)
    names = [output.name for output in session.get_outputs()]
    caches = Caches.of(model_inputs(session, "the model"))
    feeds = caches.prefill(tokens[:, :prefix])
    outputs = dict(zip(names, session.run(None, feeds), strict=True))
    after = session.run(None, caches.decode(feeds, outputs, tokens[:, prefix : prefix + 1]))
    return outputs["logits"], dict(zip(names, after, strict=True))["logits"]


def generated(folder, prompt):
    """Tokens that onnxruntime-genai generates greedily from a folder."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = len(prompt) + STEPS
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0)[len(prompt) :]


def logits_of(model, tokens=PROMPTS):
    """Logits of transformers."""
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@needs_genai
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_at_full_rank_equals_transformers(name, tmp_path, in_process):
    model = made(name)
    folder, bundle = write_folder(tmp_path / name, model), tmp_path / "bundle"
    (folder / "notes.txt").write_text("mine")
    report = export(str(folder), bundle, **FULL)
    assert len(report.split_sites) >= 8
    logits = logits_of(model)
    for file in ("dense.onnx", "model.onnx"):
        prefill, decode = decoded(bundle / file, PROMPTS, 8)
        assert error(prefill, logits[:, :8]) < LIMIT
        assert error(decode, logits[:, 8:]) < LIMIT
    assert error(logits_of(model, PROMPTS[:, 8:]), logits[:, 8:]) > 1e-2  # the past counts
    with torch.no_grad():
        how = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        right = model.generate(torch.tensor(PROMPTS[:1]), **how)[0, PROMPTS.shape[1] :].numpy()
    assert len(set(right.tolist())) > 3
    assert np.array_equal(generated(bundle, PROMPTS[0]), right)
    assert (bundle / "notes.txt").read_text() == "mine"
    assert (bundle / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in bundle.iterdir()}
    assert not list(bundle.glob("*.safetensors"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "Bert" else pytest.mark.slow) for name in ENCODERS]
)
def test_an_encoder_at_full_rank_equals_transformers(name, tmp_path, in_process):
    model = made(name)
    folder, bundle = write_folder(tmp_path / name, model), tmp_path / "bundle"
    names = ["input_ids", "attention_mask", "token_type_ids"][: 3 if name in ("Bert", "Electra") else 2]
    report = export(str(folder), bundle, input_shape=tuple(f"{each}=2x12" for each in names), **FULL)
    assert len(report.split_sites) >= 8
    mask = np.ones_like(PROMPTS)
    mask[1, 5:] = 0
    feeds = {"input_ids": PROMPTS, "attention_mask": mask, "token_type_ids": PROMPTS % 2}
    with torch.no_grad():
        taken = {k: torch.tensor(v) for k, v in feeds.items() if k in names}
        right, unmasked = model(**taken), model(**taken | {"attention_mask": torch.ones(2, 9)})
    outputs = {"Roberta": ["logits"], "Bert": ["last_hidden_state", "pooler_output"]}.get(name, ["last_hidden_state"])
    for file in ("dense.onnx", "model.onnx"):
        session = make_session(bundle / file)
        assert [each.name for each in session.get_inputs()] == names
        assert [each.name for each in session.get_outputs()] == outputs
        for each, values in zip(outputs, session.run(None, {k: feeds[k] for k in names}), strict=True):
            assert error(values, right[each]) < LIMIT
            assert error(values[1], unmasked[each][1]) > 1e-2  # the mask counts


@needs_genai
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_what_the_builder_cannot_make_is_refused(name, tmp_path, in_process):
    folder = write_folder(tmp_path / name, made(name))
    words = "logits of the ONNX model differ" if name == "Olmo" else f"{name} model is not currently supported"
    with pytest.raises(ModelError, match=f"{words}.*optimum-cli export onnx"):
        onnx_folder(folder)
    assert not list((cache_folder() / "models").glob(f"*/{name}"))


@needs_genai
def test_a_folder_is_converted_once(tmp_path, ran, monkeypatch):
    """In a process of its own: what every verb does, and again after a file has changed."""
    folder = write_folder(tmp_path / "tiny", made("Llama"))
    text = text_models.write_text(tmp_path / "t.txt")
    assert "sites would be split" in ran("inspect", folder, "--no-spectra")
    first = find_model(folder)
    monkeypatch.setattr(conversion, "run_program", None)  # no second conversion
    assert find_model(folder) == first
    assert "perplexity" in ran("eval", folder, "--data", text, "--sequence-length", 8)
    ran("export", folder, "--calib", text, "--sequence-length", 8, "--rank", "50%", "--no-bench", "-o", tmp_path / "b")
    ran("bench", folder, tmp_path / "b", "--seconds", 0.1, "--data", text, "--sequence-length", 8)
    if has_genai:
        ran("bench", folder, tmp_path / "b", "--prompt", 8, "--generate", 4, "--seconds", 0.1)
    assert f'model = "{folder}"' in (tmp_path / "b" / "recipe.toml").read_text()
    (folder / "notes.txt").write_text("new")
    with pytest.raises(TypeError):
        find_model(folder)


@needs_genai
def test_shards_are_read_and_a_missing_one_is_named(tmp_path, in_process):
    model = made("Llama")
    folder = write_folder(tmp_path / "m", model, max_shard_size="100KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    prefill, _ = decoded(find_model(folder), PROMPTS, 8)
    assert error(prefill, logits_of(model)[:, :8]) < 1e-4
    (folder / shards[1]).unlink()
    with pytest.raises(UsageError, match=shards[1]):
        find_model(folder)
    assert in_process == [conversion.PROGRAM]


@needs_genai
@pytest.mark.parametrize("name", ["Gemma", "Llama"])
def test_half_precision_becomes_float32_without_rounding(name, tmp_path, in_process):
    """Gemma's norms multiply by 1 + weight, which has no room in bfloat16."""
    model = made(name).to(torch.bfloat16 if name == "Gemma" else torch.float16)
    folder = write_folder(tmp_path / "m", model)
    path = find_model(folder)
    types = {tensor.data_type for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert not types & {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16}
    prefill, _ = decoded(path, PROMPTS, 8)
    right = logits_of(type(model).from_pretrained(folder, dtype=torch.float32))
    assert error(prefill, right[:, :8]) < 1e-5


@needs_genai
@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_stored_once(tied, tmp_path, in_process):
    model = made("Llama", tie_word_embeddings=tied)
    folder, bundle = write_folder(tmp_path / "m", model), tmp_path / "bundle"
    params = sum(weight.numel() for weight in model.parameters())
    report = export(str(folder), bundle, rank="25%", measure=False)
    assert report.dense.params == pytest.approx(params, rel=0.03)
    head = 4 * ROWS * 64
    assert abs(file_bytes(find_model(folder)) - 4 * params) < head / 2
    small = 4 * report.compressed.params
    assert abs(file_bytes(bundle / "model.onnx") - small) < head / 2
    tokens = greedy_tokens(make_session(find_model(folder)), PROMPTS, STEPS)
    assert not np.array_equal(greedy_tokens(make_session(bundle / "model.onnx"), PROMPTS, STEPS), tokens)


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (
            "Llama",
            {"auto_map": {"AutoModelForCausalLM": "m.Mine"}, "model_type": "mine"},
            "auto_map.*never run.*optimum",
        ),
        ("Bert", {"auto_map": {"AutoModel": "m.Mine"}, "model_type": "mine"}, "auto_map.*never run.*optimum"),
        ("Llama", {"quantization_config": {"quant_method": "awq"}}, "quantized weights"),
        ("Bert", {"is_encoder_decoder": True}, "several ONNX models.*optimum"),
        ("Llama", {"architectures": ["LlavaForConditionalGeneration"]}, "several ONNX models.*optimum"),
    ],
)
def test_what_cannot_be_one_model_is_refused_before_any_work(kind, values, words, tmp_path, in_process):
    folder = write_folder(tmp_path / "m", made(kind))
    change_config(folder, **values)
    with pytest.raises(UsageError, match=words):
        find_model(folder)
    assert in_process == []


@needs_genai
def test_code_that_transformers_has_itself_is_not_refused(tmp_path, in_process):
    """Many folders name their old code; transformers' own is taken, and theirs does not run."""
    folder = write_folder(tmp_path / "m", made("Llama"))
    (folder / "m.py").write_text("raise SystemExit('this code ran')")
    change_config(folder, auto_map={"AutoConfig": "m.Mine", "AutoModelForCausalLM": "m.Mine"})
    assert find_model(folder).name == "model.onnx"
    assert (onnx_folder(folder) / "m.py").is_file()  # it lies beside the model, as it did


def test_folders_that_lack_something_say_what(tmp_path, in_process, monkeypatch):
    model = made("Llama")
    with pytest.raises(UsageError, match=r"no tokenizer.*tokenizer\.json"):
        find_model(write_folder(tmp_path / "plain", model, tokenizer=False))
    empty = write_folder(tmp_path / "empty", model)
    (empty / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"neither an ONNX file nor model\.safetensors"):
        find_model(empty)
    encoder = write_folder(tmp_path / "encoder", made("Bert"), tokenizer=False)
    text = text_models.write_text(tmp_path / "t.txt")
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        export(str(encoder), tmp_path / "b", calib=str(text), rank="50%")
    unknown = write_folder(tmp_path / "unknown", made("Bert"))
    change_config(unknown, architectures=["MineModel"])
    with pytest.raises(ModelError, match="no class MineModel.*optimum-cli"):
        find_model(unknown)
    broken = write_folder(tmp_path / "broken", made("Bert"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="[Ss]afe[Tt]ensor"):
        find_model(broken)
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(text))
    with pytest.raises(UsageError, match="set RSI_DEPLOY_CACHE"):
        find_model(broken)
    escaping = write_folder(tmp_path / "escaping", model, max_shard_size="100KB")
    index = escaping / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    index.write_text(json.dumps(found | {"weight_map": {"a": "../plain/model.safetensors"}}))
    with pytest.raises(ModelError, match="names no files of the folder"):
        find_model(escaping)


@pytest.mark.parametrize(("package", "extra"), [("transformers", "[hf]"), ("onnxruntime_genai", "[hf,genai]")])
def test_a_missing_package_says_what_to_install(package, extra, tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "m", made("Llama"))
    find = conversion.check_transformers.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(UsageError) as caught:
        find_model(folder)
    assert f'pip install "rsi-deploy{extra}"' in str(caught.value)


def test_the_least_recently_used_conversions_go(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "KEPT_BYTES", 250)
    for age, name in enumerate("abcd"):
        (tmp_path / name / "m").mkdir(parents=True)
        (tmp_path / name / "m" / "model.onnx").write_bytes(bytes(100))
        then = conversion.time.time() - age * 30 * 3600
        os.utime(tmp_path / name, (then, then))
    conversion._remove_old(tmp_path, tmp_path / "d")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d"}  # c is third and old; d is in use
    shutil.rmtree(tmp_path / "d")
