"""Text as data: documents, rows of tokens as the model's inputs want them, and what is refused."""

import json

import numpy as np
import pytest
import text_models

from rsi_deploy.calibration.calibration_data import CalibrationData, document_parts
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.text_data import TextOptions, TextRows, TextSource, is_text, with_text
from rsi_deploy.data.text_files import read_texts
from rsi_deploy.data.tokenizer import Row, embedding_rows
from rsi_deploy.runtime.feeds.inputs import model_inputs

pytest.importorskip("tokenizers", reason="needs rsi-deploy[text]")


@pytest.fixture
def folder(tmp_path):
    return text_models.write_folder(tmp_path / "model")


def rows_of(text, folder, column=None, inputs=text_models.INPUTS, length="tokens", **options):
    """The rows of a text for a model with these inputs."""
    source = with_text(str(text), TextOptions(column=column, **options), str(folder))
    assert isinstance(source, TextSource)
    return source.for_inputs(model_inputs(text_models.model(inputs, length)))


def inputs_of(rows):
    """All rows as one batch."""
    return next(rows.batches(len(rows), None))[0]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (" = One = \n a\n\n = = part = = \n b\n = Two = \n c\n", [[" = One = ", " a", " = = part = = ", " b"], 2]),
        ("a\nb\n\n\nc\n", [["a", "b"], ["c"]]),
        ("a\nb\n", [["a"], ["b"]]),
        ("\ufeffa\r\nb", [["a"], ["b"]]),
    ],
)
def test_lines_are_parted_into_documents(tmp_path, content, documents):
    (tmp_path / "t.txt").write_bytes(content.encode())
    found = read_texts(tmp_path / "t.txt").documents
    assert found[0] == documents[0]
    assert found[1:] == (documents[1:] if documents[1] != 2 else [[" = Two = ", " c"]])


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('{"text": "a"', "not JSON"),
        ('["a"]', "object"),
        ('{"body": "a"}', "--column"),
        ('{"text": 3}', "int"),
        ('{"text": "\\ud800"}', "Unicode"),
    ],
)
def test_an_unreadable_record_is_named_by_its_line(tmp_path, line, names):
    (tmp_path / "t.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(UsageError, match=f"line 3.*{names}|{names}.*line 3"):
        read_texts(tmp_path / "t.jsonl")


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(UsageError, match="line 2"):
        read_texts(tmp_path / "t.txt")


def test_the_column_is_chosen(tmp_path, folder):
    pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
    pq = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "w1", "body": "w2 w3"}) + "\n")
    pq.write_table(pa.table({"text": ["w1"], "body": ["w2 w3"], "number": [1]}), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        assert rows_of(tmp_path / name, folder).rows[0].ids.tolist() == [2, 5, 3]
        assert rows_of(tmp_path / name, folder, column="body").rows[0].ids.tolist() == [2, 6, 7, 3]
        with pytest.raises(UsageError, match="--column"):
            rows_of(tmp_path / name, folder, column="number" if name.endswith("parquet") else "absent")


def test_a_table_is_text_only_for_a_model_with_a_tokenizer(tmp_path, folder):
    pa = pytest.importorskip("pyarrow", reason="needs rsi-deploy[data]")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["w1"], "x": [1.0]}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"text": ["w1"], "input_ids": [[1]]}), tmp_path / "ids.parquet")
    path = str(tmp_path / "t.parquet")
    assert is_text(path, TextOptions(), folder)
    assert not is_text(path, TextOptions(), tmp_path)
    assert is_text(path, TextOptions(column="text"), tmp_path)
    assert not is_text(str(tmp_path / "ids.parquet"), TextOptions(), folder)
    assert with_text(path, TextOptions(), str(tmp_path / "absent.onnx")) == path


def test_texts_of_an_encoder_are_padded_under_the_mask(tmp_path, folder):
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 w5 w6\nw7\n")
    rows = rows_of(tmp_path / "t.txt", folder, inputs=(*text_models.INPUTS, "position_ids"), sequence_length=6)
    found = inputs_of(rows)
    assert found["input_ids"].tolist() == [[2, 5, 6, 7, 8, 3], [2, 11, 3, 0, 0, 0]]
    assert found["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert not found["token_type_ids"].any()
    assert found["position_ids"].tolist() == [list(range(6))] * 2
    assert "1 texts are longer" in rows.notes[0]
    # Padding to the longest text, not to the largest length; the default is the folder's own limit.
    assert inputs_of(rows_of(tmp_path / "t.txt", folder))["input_ids"].shape == (2, 8)


def test_a_fixed_length_is_kept(tmp_path, folder):
    (tmp_path / "t.txt").write_text("w1\nw2 w3\n")
    assert inputs_of(rows_of(tmp_path / "t.txt", folder, length=9))["input_ids"].shape == (2, 9)
    with pytest.raises(UsageError, match="--sequence-length 9"):
        rows_of(tmp_path / "t.txt", folder, length=9, sequence_length=8)
    with pytest.raises(UsageError, match="24"):
        rows_of(tmp_path / "t.txt", folder, sequence_length=25)


def test_without_a_mask_nothing_is_padded(tmp_path, folder):
    (tmp_path / "t.txt").write_text("w1 w2 w3\nw4\nw5 w6 w7 w8\n")
    rows = rows_of(tmp_path / "t.txt", folder, inputs=("input_ids",), sequence_length=5)
    assert inputs_of(rows)["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 9, 10, 11, 3]]
    with pytest.raises(UsageError, match="shorter"):
        rows_of(tmp_path / "t.txt", folder, inputs=("input_ids",), sequence_length=12)


def test_windows_of_a_decoder_stay_in_their_document(tmp_path):
    folder = text_models.write_folder(tmp_path / "model", config={"architectures": ["TinyForCausalLM"]})
    documents = ["w0 w0 w0 w0 w0 w0 w0", "w1", "w2", "w3 w3 w3 w3"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    rows = rows_of(tmp_path / "t.jsonl", folder, sequence_length=4)
    found = inputs_of(rows)["input_ids"]
    # 9 tokens give two windows; 3 and 3 tokens are joined to one; 6 give one. The rest fills no window.
    assert rows.documents.tolist() == [0, 0, 1, 2]
    assert found.tolist() == [[2, 4, 4, 4], [4, 4, 4, 4], [2, 5, 3, 2], [2, 7, 7, 7]]
    assert "5 tokens" in rows.notes[0]
    with pytest.raises(UsageError, match="24 tokens"):
        rows_of(tmp_path / "t.jsonl", folder, sequence_length=24)


def test_other_inputs_are_named(tmp_path, folder):
    (tmp_path / "t.txt").write_text("w1\n")
    with pytest.raises(UsageError, match=r"past_key_values.0.key.*--feeds"):
        rows_of(tmp_path / "t.txt", folder, inputs=(*text_models.INPUTS, "past_key_values.0.key"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, folder):
    (tmp_path / "t.txt").write_text("w1\n")
    assert embedding_rows(text_models.model()) == 64
    text_models.write_tokenizer(folder, [*text_models.WORDS, "more"])
    with pytest.raises(UsageError, match=r"65.*64"):
        rows_of(tmp_path / "t.txt", folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        rows_of(tmp_path / "t.txt", folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        rows_of(tmp_path / "t.txt", folder)
    with pytest.raises(UsageError, match="is no folder"):
        rows_of(tmp_path / "t.txt", "torchvision:resnet18")


def text_rows(sizes, tokens=10, most=None):
    """Rows of documents of these sizes."""
    documents = np.repeat(np.arange(len(sizes)), sizes)
    row = Row(np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32), False)
    return TextRows(
        rows=[row] * len(documents),
        documents=documents,
        width=tokens,
        pad=0,
        names=("input_ids",),
        notes=(),
        most_tokens=most,
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [1, 3])
def test_no_document_is_in_both_parts(seed, unit):
    rng = np.random.default_rng(seed)
    text = text_rows(rng.integers(1, 30, 25), most=1500)
    fit, check = document_parts(text, 200, None, unit, np.random.default_rng(seed))
    assert not set(text.documents[fit]) & set(text.documents[check])
    assert len(fit) % unit == len(check) % unit == 0
    assert len(fit) <= 150
    assert len(fit) > 100
    assert len(check) >= 20
    assert (np.diff(fit) > 0).all()
    # The same rows again where the numbers of both are what is wanted: `verify` does that.
    again = document_parts(text, len(fit), len(check), unit, np.random.default_rng(seed))
    assert all(np.array_equal(*pair) for pair in zip((fit, check), again, strict=True))
    # Windows that are parted one by one, as samples are, would share documents.
    alone = rng.permutation(len(text))
    assert set(text.documents[alone[: len(fit)]]) & set(text.documents[alone[len(fit) :]])


def test_one_document_has_no_check_part():
    fit, check = document_parts(text_rows([50]), 20, None, 1, np.random.default_rng(0))
    assert (len(fit), len(check)) == (20, 0)


def test_calibration_data_of_text(tmp_path, folder):
    text = text_models.write_text(tmp_path / "t.txt")
    specs = model_inputs(text_models.model())
    source = with_text(str(text), TextOptions(tokens=700), str(folder))
    data = CalibrationData(source, specs, None, 100)

    def first_words(part):
        return {int(ids[1]) for feeds in part.feeds() for ids in feeds["input_ids"]}

    assert data.check is not None
    assert not first_words(data.fit) & first_words(data.check)
    assert sum(int(feeds["attention_mask"].sum()) for feeds in data.feeds()) <= 700
    assert data.samples > 50
    assert "160 rows" in data.notes()[0]
    fingerprints = {
        with_text(str(text), TextOptions(tokens=700, **options), str(folder)).fingerprint()
        for options in ({}, {"sequence_length": 8})
    }
    assert len(fingerprints) == 2


def test_text_of_its_own_for_the_check_part(tmp_path, folder):
    specs = model_inputs(text_models.model())
    text, other = (text_models.write_text(tmp_path / f"{seed}.txt", seed=seed) for seed in (0, 1))
    sources = [with_text(str(path), TextOptions(), str(folder)) for path in (text, other)]
    data = CalibrationData(sources[0], specs, None, 1000, check_source=sources[1], check_size=20)
    assert data.samples == 160
    assert data.check.samples == 20
    with pytest.raises(UsageError, match="share"):
        CalibrationData(sources[0], specs, None, 1000, check_source=sources[0])
