"""`.pt2` archives: what torch's reader would execute is refused before it reads anything."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.programs import read_program


class WritesAFile:
    """Executed when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.fc(x)) * x.shape[0]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A program with a dynamic batch, so that there are expressions in it."""
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 4),), dynamic_shapes={"x": {0: batch}}), path)
    return path


def changed(source, target, change):
    """The archive with `change(name, content)` as the content of each entry, and what it adds under the name ""."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, change(entry.filename, old.read(entry)))
    return target


def in_json(change):
    """Change every value of the model's JSON."""

    def walk(value):
        if isinstance(value, dict):
            return {key: change(key, walk(entry)) for key, entry in value.items()}
        return [walk(entry) for entry in value] if isinstance(value, list) else value

    return lambda name, content: json.dumps(walk(json.loads(content))).encode() if name.endswith(".json") else content


def test_a_good_program_is_read(good):
    program = read_program(good)
    x = torch.randn(5, 4)
    assert torch.equal(program.module()(x), torch.export.load(good).module()(x))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "().__class__",
        "sympify('1')",
        "s0.func",
        "[1][0]",
        "(",
    ],
)
def test_expressions_are_not_evaluated(good, tmp_path, text):
    path = changed(good, tmp_path / "m.pt2", in_json(lambda key, v: text if key == "expr_str" else v))
    with pytest.raises(ModelError, match="the expression .*, which could run code when it is loaded"):
        read_program(path)


@pytest.mark.parametrize("text", ["__import__('os').system('true')", "L['x'].__class__", "torch.load('x')", "f'{x}'"])
def test_guards_are_not_executed(good, tmp_path, text):
    path = changed(good, tmp_path / "m.pt2", in_json(lambda key, v: [text] if key == "guards_code" else v))
    with pytest.raises(ModelError, match="the expression"):
        read_program(path)


@pytest.mark.parametrize("name", ["torch.load", "torch.os.system", "torch.ops.load_library", "#ext", "torch.hub.load"])
def test_operators_are_of_the_tables(good, tmp_path, name):
    path = changed(good, tmp_path / "m.pt2", in_json(lambda key, v: name if key == "target" else v))
    with pytest.raises(ModelError, match="the operator"):
        read_program(path)


@pytest.mark.parametrize("name", ["data/constants/custom_obj_0", "data/constants/opaque_obj_0"])
def test_pickled_objects_are_not_executed(good, tmp_path, name):
    trace = tmp_path / "executed"
    with zipfile.ZipFile(good) as archive:
        top = archive.namelist()[0].partition("/")[0]
    path = changed(good, tmp_path / "m.pt2", lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{top}/{name}", pickle.dumps(WritesAFile(trace)))
    with pytest.raises(ModelError, match="a pickled object"):
        read_program(path)
    assert not trace.exists()


def test_pickled_inputs_are_not_executed(good, tmp_path):
    trace = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(((WritesAFile(trace),), {}), buffer)
    path = changed(good, tmp_path / "m.pt2", lambda name, old: buffer.getvalue() if "sample_inputs" in name else old)
    with zipfile.ZipFile(path) as archive:
        assert [name for name in archive.namelist() if "sample_inputs" in name and name.endswith(".pt")]
    with pytest.raises(ModelError, match=r"m\.pt2 is not a readable torch\.export archive"):
        read_program(path)
    assert not trace.exists()


def test_compiled_libraries_are_not_loaded(good, tmp_path):
    path = changed(good, tmp_path / "m.pt2", lambda _, content: content)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/aotinductor/model/m.so", b"\x7fELF")
    with pytest.raises(ModelError, match="a compiled library"):
        read_program(path)


def test_files_that_are_not_archives(tmp_path):
    for content in (b"", b"PK\x05\x06" + b"\0" * 18, b"text"):
        (tmp_path / "m.pt2").write_bytes(content)
        with pytest.raises(ModelError, match=r"m\.pt2 is not a readable torch\.export archive"):
            read_program(tmp_path / "m.pt2")
