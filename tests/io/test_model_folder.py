"""The folder of a model: which ONNX file is meant, and what goes along into a bundle."""

import json

import pytest

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.folders.beside import copy_beside
from rsi_deploy.io.model_folder import find_model, folder_of, model_file


def fill(folder, *names, **documents):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def genai(**files):
    return {"model": {"type": "x", **{part: {"filename": name, "head_size": 4} for part, name in files.items()}}}


@pytest.mark.parametrize(
    ("names", "documents", "found"),
    [
        (["model.onnx"], {}, "model.onnx"),
        (["onnx/model.onnx", "onnx/model_O2.onnx", "config.json"], {}, "onnx/model.onnx"),
        (["model.onnx", "dense.onnx", "report.json"], {}, "model.onnx"),
        (["other.onnx", "._other.onnx"], {}, "other.onnx"),
        (["model.onnx", "text.onnx"], {"genai_config": genai(decoder="text.onnx")}, "text.onnx"),
        (["model.onnx"], {"genai_config": {"model": {"decoder": {}}}}, "model.onnx"),
    ],
)
def test_the_file_is_found(tmp_path, names, documents, found):
    fill(tmp_path, *names, **documents)
    assert find_model(tmp_path) == tmp_path / found
    assert model_file(str(tmp_path)) == str(tmp_path / found)
    assert model_file("torchvision:resnet18") == "torchvision:resnet18"
    assert folder_of(tmp_path / found) == folder_of(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("names", "documents", "words"),
    [
        (["a.onnx", "onnx/b.onnx"], {}, ("a.onnx", "b.onnx")),
        (["model.onnx", "onnx/model.onnx"], {}, ("onnx/model.onnx",)),
        (["readme.txt"], {}, ("no ONNX file",)),
        (["a.onnx", "b.onnx"], {"genai_config": genai(decoder="a.onnx", encoder="b.onnx")}, ("a.onnx", "b.onnx")),
        (["model.onnx"], {"genai_config": genai(decoder="absent.onnx")}, ("absent.onnx", "genai_config.json")),
        (["config.json"], {"config": {"architectures": ["BertModel"]}}, ("model.safetensors",)),
        (["pytorch_model.bin"], {"config": {"architectures": ["BertModel"]}}, ("pickles", "optimum-cli")),
        (["model.safetensors"], {}, ("no ONNX file",)),
    ],
)
def test_what_cannot_be_meant_says_what_to_type(tmp_path, names, documents, words):
    fill(tmp_path, *names, **documents)
    with pytest.raises(UsageError) as caught:
        find_model(tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert "type" in str(caught.value) or "with" in str(caught.value)


def test_a_path_out_of_the_folder_is_no_model(tmp_path):
    fill(tmp_path, "outside/secret.onnx")
    folder = fill(tmp_path, "model/x.txt") / "model"
    fill(folder, genai_config=genai(decoder="../outside/secret.onnx"))
    with pytest.raises(UsageError, match="secret"):
        find_model(folder)
    (folder / "genai_config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        find_model(folder)


def test_all_but_weights_goes_along(tmp_path):
    kept = ["config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "LICENSE", "onnx/notes.txt"]
    dense = ["2_Dense/model.safetensors", "2_Dense/config.json"]
    left = ["onnx/model.onnx", "onnx/model.onnx_data", "w.data", "model.safetensors", "model.safetensors.index.json"]
    left += ["pytorch_model.bin", ".git/config", "bundle/model.onnx", "bundle/config.json", "3_Other/weights.bin"]
    folder = fill(tmp_path / "model", *kept, *dense, *left, "README.md", "report.json")
    fill(folder, modules=[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    (folder / "bundle" / "manifest.json").write_text('{"schema_version": 1, "files": {}}')
    target = tmp_path / "target"
    notes = copy_beside(folder, target)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {*kept, *dense, "modules.json", "README.source.md"}
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in (*kept, *dense))
    assert "report.json" in notes[1]


def test_only_the_file_name_of_genai_changes(tmp_path):
    folder = fill(tmp_path / "model", "text.onnx", "tokenizer.json", genai_config=genai(decoder="text.onnx"))
    copy_beside(folder, tmp_path / "target")
    found = json.loads((tmp_path / "target" / "genai_config.json").read_text())
    assert found == genai(decoder="model.onnx") != genai(decoder="text.onnx")


def test_links_may_not_leave_the_folder(tmp_path):
    fill(tmp_path, "secret.txt", "hub/blobs/1234")
    folder = fill(tmp_path / "model", "model.onnx")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UsageError, match=r"vocab\.txt is a link"):
        copy_beside(folder, tmp_path / "target")
    # Hugging Face's cache links its files to blobs beside the snapshots.
    snapshot = fill(tmp_path / "hub" / "snapshots" / "abc", "model.onnx")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "hub" / "blobs" / "1234")
    copy_beside(snapshot, tmp_path / "other")
    assert (tmp_path / "other" / "vocab.txt").read_text() == "hub/blobs/1234"
    assert not (tmp_path / "other" / "vocab.txt").is_symlink()
    (snapshot / "merges.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UsageError, match="link"):
        copy_beside(snapshot, tmp_path / "third")


def test_a_folder_of_large_files_is_refused(tmp_path, monkeypatch):
    folder = fill(tmp_path / "model", "model.onnx", "dataset.csv")
    monkeypatch.setattr("rsi_deploy.io.folders.beside.MOST_BYTES", 5)
    with pytest.raises(UsageError, match="ONNX file"):
        copy_beside(folder, tmp_path / "target")
