"""Parquet and Arrow files, and the folders that Hugging Face `datasets` saves."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrowData, open_data

pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
pq = pytest.importorskip("pyarrow.parquet")

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(30) % 3


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def pictures(rows=slice(None), column="image"):
    return {column: [{"bytes": png(image), "path": None} for image in IMAGES[rows]]}


def table(columns, class_labels=None):
    found = pa.table(columns)
    features = {name: {"_type": "ClassLabel", "names": names} for name, names in (class_labels or {}).items()}
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(folder, content, shards=2):
    """The layout of `datasets.save_to_disk`."""
    folder.mkdir(parents=True)
    size = -(-len(content) // shards)
    names = [f"data-{shard:05d}-of-{shards:05d}.arrow" for shard in range(shards)]
    for shard, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
            writer.write_table(content.slice(shard * size, size), max_chunksize=4)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def read(dataset, batch_size=4, steps=None, limit=None):
    batches = list(dataset.batches(batch_size, steps, limit))
    labels = None if batches[0][1] is None else np.concatenate([labels for _, labels in batches])
    if isinstance(batches[0][0], dict):
        return {name: np.concatenate([inputs[name] for inputs, _ in batches]) for name in batches[0][0]}, labels
    return np.concatenate([inputs for inputs, _ in batches]), labels


WHOLE = table({**pictures(), "label": LABELS}, {"label": ["ant", "bee", "cat"]})


@pytest.fixture(params=["parquet", "arrow", "arrow stream", "saved", "downloaded"])
def source(request, tmp_path):
    path = tmp_path / "d.parquet"
    if request.param == "parquet":
        pq.write_table(WHOLE, path, row_group_size=7)
    elif request.param == "arrow":
        path = tmp_path / "d.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, WHOLE.schema) as writer:
            writer.write_table(WHOLE, max_chunksize=11)
    elif request.param == "arrow stream":
        path = save_to_disk(tmp_path / "s", WHOLE, shards=1) / "data-00000-of-00001.arrow"
    elif request.param == "saved":
        path = save_to_disk(tmp_path / "s", WHOLE, shards=3)
    else:
        path = tmp_path / "hub"
        (path / "data").mkdir(parents=True)
        for shard in range(2):
            pq.write_table(WHOLE.slice(15 * shard, 15), path / "data" / f"test-{shard:05d}-of-00002.parquet")
        (path / "README.md").write_text("a data card")
    return path


def test_pictures_and_labels_of_every_layout(source):
    dataset = open_data(source)
    assert isinstance(dataset, ArrowData)
    assert (len(dataset), dataset.kind, dataset.classes) == (30, "images", ("ant", "bee", "cat"))
    inputs, labels = read(dataset)
    np.testing.assert_array_equal(inputs, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)
    steps = Preprocessing(crop=(4, 4))
    np.testing.assert_array_equal(read(dataset, 7, steps)[0], steps.apply(IMAGES))


def test_a_limit_is_spaced_evenly(source):
    inputs, labels = read(open_data(source), limit=7)
    rows = np.arange(7) * 30 // 7
    np.testing.assert_array_equal(inputs, IMAGES[rows])
    np.testing.assert_array_equal(labels, LABELS[rows])


def test_the_fingerprint_is_of_the_content(source, tmp_path):
    pq.write_table(WHOLE, tmp_path / "other.parquet", row_group_size=13, compression="none")
    assert open_data(source).fingerprint() == open_data(tmp_path / "other.parquet").fingerprint()
    changed = table({**pictures(), "label": LABELS[::-1].copy()}, {"label": ["ant", "bee", "cat"]})
    pq.write_table(changed, tmp_path / "changed.parquet")
    assert open_data(source).fingerprint() != open_data(tmp_path / "changed.parquet").fingerprint()


def test_only_rows_that_are_wanted_are_decoded(tmp_path, monkeypatch):
    import rsi_deploy.data.arrow_data as module

    pq.write_table(WHOLE, tmp_path / "d.parquet", row_group_size=5)
    decoded = []
    inner = module.read_image
    monkeypatch.setattr(module, "read_image", lambda *a: decoded.append(1) or inner(*a))
    read(open_data(tmp_path / "d.parquet"), limit=3)
    assert len(decoded) == 3


def test_splits_are_chosen_and_never_guessed(tmp_path):
    for split, rows in (("train", slice(0, 20)), ("test", slice(20, 30))):
        save_to_disk(tmp_path / "d" / split, WHOLE.slice(rows.start, rows.stop - rows.start), shards=1)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    np.testing.assert_array_equal(read(open_data(f"{tmp_path / 'd'}#split=test"))[0], IMAGES[20:])
    with pytest.raises(UsageError, match=r"several splits.*train, test: type .*d#split=test"):
        open_data(tmp_path / "d")
    with pytest.raises(UsageError, match="no split 'dev'; there are train, test"):
        open_data(f"{tmp_path / 'd'}#split=dev")
    with pytest.raises(UsageError, match="has no splits"):
        open_data(f"{tmp_path / 'd' / 'test'}#split=test")
    for name in ("train", "test"):
        pq.write_table(WHOLE, tmp_path / f"{name}.parquet")
    with pytest.raises(UsageError, match="several splits"):
        open_data(tmp_path)
    assert len(open_data(f"{tmp_path}#split=train")) == 30


def test_a_choice_between_labels_is_the_users(tmp_path):
    names = {"fine": ["a", "b", "c"], "coarse": ["x", "y"]}
    pq.write_table(table({**pictures(), "fine": LABELS, "coarse": LABELS % 2}, names), tmp_path / "d.parquet")
    path = tmp_path / "d.parquet"
    with pytest.raises(UsageError, match=r"2 columns that may be the label: fine, coarse; choose one: .*#label=fine"):
        open_data(path)
    dataset = open_data(f"{path}#label=coarse")
    np.testing.assert_array_equal(dataset.labels, LABELS % 2)
    assert dataset.classes == ("x", "y")
    with pytest.raises(UsageError, match="no column fines; there are image, fine, coarse"):
        open_data(f"{path}#label=fines")
    with pytest.raises(UsageError, match="takes split, image, label after the #, but got labels"):
        open_data(f"{path}#labels=fine")
    with pytest.raises(UsageError, match="such as split=test"):
        open_data(f"{path}#fine")


def test_tokens_are_arrays_by_name(tmp_path):
    ids, mask = np.arange(20).reshape(4, 5), np.ones((4, 5), np.int8)
    columns = {"text": ["a", "b", "c", "d"], "ids": list(ids), "mask": list(mask), "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=3)
    dataset = open_data(tmp_path / "t.parquet")
    assert (dataset.kind, dataset.columns) == ("named", ("ids", "mask"))
    inputs, labels = read(dataset.select(["mask", "ids"]), batch_size=3)
    assert list(inputs) == ["mask", "ids"]
    np.testing.assert_array_equal(inputs["ids"], ids)
    np.testing.assert_array_equal(inputs["mask"], mask)
    assert labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(UsageError, match="no column types; there are ids, mask"):
        dataset.select(["ids", "types"])


def test_ready_inputs_of_any_rank(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    nested = pa.array(values.tolist(), pa.list_(pa.list_(pa.list_(pa.float32()))))
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    for name, column in (("nested", nested), ("tensor", tensor)):
        pq.write_table(pa.table({"pixel_values": column, "y": [0, 1, 0, 1]}), tmp_path / f"{name}.parquet")
        dataset = open_data(tmp_path / f"{name}.parquet")
        assert dataset.kind == "inputs"
        np.testing.assert_array_equal(read(dataset, 3)[0], values)
        np.testing.assert_array_equal(read(dataset.select(["pixel_values"]))[0]["pixel_values"], values)


def test_pictures_beside_the_table_are_found(tmp_path):
    (tmp_path / "a.png").write_bytes(png(IMAGES[0]))
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": png(IMAGES[1]), "path": "gone.png"}]
    pq.write_table(pa.table({"img": rows}), tmp_path / "d.parquet")
    inputs, labels = read(open_data(tmp_path / "d.parquet"))
    np.testing.assert_array_equal(inputs, IMAGES[:2])
    assert labels is None
    rows[0]["path"] = "absent.png"
    pq.write_table(pa.table({"img": rows}), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match=r"d\.parquet, column img, absent\.png: a row has neither"):
        read(open_data(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"ids": [[1, 2], [3]], "label": [0, 1]}, r"column ids: rows of different lengths \(1 to 2\); pad them"),
        ({"ids": [[1, 2], None], "label": [0, 1]}, "column ids: 1 empty cells"),
        ({"x": [1.0, 2.0], "label": [0, None]}, "column label: 1 empty cells"),
        ({"x": [1.0, 2.0], "label": ["ant", "bee"]}, "column label: holds string, but"),
        ({"x": [1.0, 2.0], "label": [0.5, 1.5]}, "labels must be integers"),
        ({"text": ["a", "b"], "label": [0, 1]}, "no column of pictures or numbers; there are text, label"),
        ({"image": [b"no picture", b"x"], "label": [0, 1]}, "column image cannot be read as an image"),
        ({"x": pa.array([], pa.float32())}, "has no samples"),
    ],
)
def test_tables_that_do_not_fit_say_why(tmp_path, columns, named):
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match=named) as caught:
        read(open_data(tmp_path / "d.parquet"))
    assert "d.parquet" in str(caught.value)


def test_damaged_files_are_named(tmp_path, source):
    for name, content in (("d.parquet", b"PAR1 no"), ("d.arrow", b"nothing"), ("e.arrow", b"")):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name} cannot be read"):
            open_data(tmp_path / "bad" / name)
    if (source / "state.json").is_file():
        next(iter(sorted(source.glob("*.arrow")))).unlink()
        with pytest.raises(UsageError, match=r"state\.json"):
            open_data(source)
        (source / "state.json").write_text("[1")
        with pytest.raises(UsageError, match=r"state\.json cannot be read"):
            open_data(source)


def test_rows_that_are_damaged_behind_a_good_schema_are_named(tmp_path):
    """A Parquet file says at its end what it holds, an Arrow stream at its beginning; its rows are read later."""
    path = tmp_path / "d.parquet"
    pq.write_table(WHOLE, path, compression="none")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    with pytest.raises(UsageError, match=r"d\.parquet cannot be read: .*; copy it again"):
        read(open_data(path))
    stream = save_to_disk(tmp_path / "s", WHOLE, shards=1) / "data-00000-of-00001.arrow"
    assert len(open_data(stream)) == 30
    stream.write_bytes(stream.read_bytes()[: stream.stat().st_size * 2 // 3])
    with pytest.raises(UsageError, match=r"00001\.arrow cannot be read: .*; copy it again"):
        open_data(stream)


def test_without_pyarrow_it_says_what_to_type(tmp_path, monkeypatch):
    pq.write_table(WHOLE, tmp_path / "d.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"needs pyarrow; type: pip install 'rsi-deploy\[data\]'"):
        open_data(tmp_path / "d.parquet")


def test_what_datasets_itself_saves(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    made = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in IMAGES], "label": LABELS.tolist()}, features=features
    )
    made.save_to_disk(tmp_path / "d", num_shards=2)
    dataset = open_data(tmp_path / "d")
    np.testing.assert_array_equal(read(dataset)[0], IMAGES)
    assert dataset.classes == ("a", "b", "c")
