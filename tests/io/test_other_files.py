"""Tables, folders of pictures, documents, bundles of strangers: nothing outside their folder, and all with an end."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.data.arrow_data import ArrowData
from rsi_deploy.data.arrow_files import table_files
from rsi_deploy.data.folder_data import ImageFolderData
from rsi_deploy.data.sources import open_data
from rsi_deploy.io.documents import DOCUMENT_BYTES, read_document
from rsi_deploy.io.manifest import read_manifest
from rsi_deploy.report.pages.html import source_of
from rsi_deploy.serving.bundles import open_bundle

pa = pytest.importorskip("pyarrow", reason='pip install "rsi-deploy[data]"')


def picture(path):
    Image.new("RGB", (4, 4)).save(path)
    return path


def table(path, picture_path):
    rows = pa.table({"image": [{"bytes": None, "path": picture_path}], "label": [0]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    return path


def test_a_table_may_only_name_pictures_in_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    outside, inside = picture(tmp_path / "secret.png"), picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "link.png").symlink_to(outside)
    for name in (inside.name, str(inside)):
        data = ArrowData([table(tmp_path / "in" / "t.arrow", name)], "t")
        assert next(data.batches(1, None))[0].shape == (1, 4, 4, 3)
    for name in ("../secret.png", str(outside), "link.png", "a\0b"):
        data = ArrowData([table(tmp_path / "in" / "t.arrow", name)], "t")
        with pytest.raises(UsageError, match="a file in the table's folder"):
            next(data.batches(1, None))


def test_a_saved_data_set_may_only_name_files_in_its_folder(tmp_path):
    (tmp_path / "in").mkdir()
    table(tmp_path / "secret.arrow", "a.png")
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        (tmp_path / "in" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(UsageError, match="state.json"):
            table_files(tmp_path / "in")
    shutil.copy(tmp_path / "secret.arrow", tmp_path / "in" / "t.arrow")
    (tmp_path / "in" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "t.arrow"}]}))
    assert table_files(tmp_path / "in") == [tmp_path / "in" / "t.arrow"]


def test_a_damaged_table_ends_in_a_message(tmp_path):
    """Offsets in an Arrow file are believed by native code, so they are checked before."""
    rows = pa.table({"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1], "text": ["some", "words"]})
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    content = (tmp_path / "t.arrow").read_bytes()
    random, ended = np.random.default_rng(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[random.integers(len(damaged))] = random.integers(256)
        (tmp_path / "d.arrow").write_bytes(damaged)
        try:
            ArrowData([tmp_path / "d.arrow"], "d").fingerprint()
        except UsageError:
            ended += 1
    assert 50 < ended < 300


def test_more_rows_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rsi_deploy.data.arrow_files.MOST_ROWS", 1)
    path = tmp_path / "t.arrow"
    rows = pa.table({"x": [1.0, 2.0]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(UsageError, match="2 rows; the limit is 1"):
        open_data(path)


def test_a_pipe_among_pictures_is_none(tmp_path):
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "b.png")
    picture(tmp_path / "cat" / "a.png")
    assert len(ImageFolderData(tmp_path)) == 1


def test_a_document_has_an_end(tmp_path):
    with pytest.raises(UsageError, match="has more than 64 MiB"):
        read_document("/dev/zero")
    (tmp_path / "large.json").write_bytes(b" " * DOCUMENT_BYTES + b"{}")
    with pytest.raises(UsageError, match="has more than 64 MiB"):
        read_document(tmp_path / "large.json")
    (tmp_path / "page.html").write_bytes(b"<p>" * (1 << 20))
    assert source_of(tmp_path / "page.html") is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, str(1 << 63), str(-(1 << 70))])
def test_a_document_has_no_such_numbers(tmp_path, number):
    (tmp_path / "d.json").write_text(f'{{"a": [1, {number}]}}')
    with pytest.raises(UsageError, match="has the number"):
        read_document(tmp_path / "d.json")
    for text in ('{"a": [1, -2.5e10, 0]}', "no JSON", "[" * 100_000):
        (tmp_path / "d.json").write_text(text)
        assert read_document(tmp_path / "d.json") == text


DEEP = "[" * 50_000 + "]" * 50_000


@pytest.mark.parametrize("text", [DEEP, '{"files": ' * 5000, "\ud800", '{"schema_version": 1, "files": {"../x": {}}}'])
def test_documents_that_are_none(tmp_path, text):
    for name, read, error in (
        ("manifest.json", read_manifest, GateError),
        ("report.json", open_bundle, (ModelError, GateError)),
    ):
        (tmp_path / name).write_bytes(text.encode("utf-8", errors="surrogatepass"))
        with pytest.raises(error, match=name.replace(".", r"\.")):
            read(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["../m.onnx", "/etc/hostname", "a/../../b"])
def test_a_report_may_only_name_files_of_its_folder(tmp_path, name):
    (tmp_path / "report.json").write_text(json.dumps({"schema_version": 1, "files": {name: "0" * 64}}))
    with pytest.raises(ModelError, match="a file's name must be its path within the folder"):
        open_bundle(tmp_path)
