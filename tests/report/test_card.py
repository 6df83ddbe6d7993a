import re

import pytest
from nets import SIZES, labelled, mlp_onnx

from rsi_deploy import export
from rsi_deploy.data.preprocess import Preprocessing


@pytest.fixture
def bundle(tmp_path):
    data = labelled(tmp_path / "d.npz", mlp_onnx(tmp_path / "m.onnx"))
    export(
        str(tmp_path / "m.onnx"),
        tmp_path / "b",
        rank=6,
        data=data,
        bench_seconds=0.05,
        exclude=["fc2"],
        allow_slower=True,
        allow_larger=True,
    )
    return tmp_path / "b"


def card(bundle):
    return (bundle / "README.md").read_text()


@pytest.mark.parametrize("batch", ["batch", 3])
def test_the_code_on_the_card_runs_in_the_bundle(tmp_path, monkeypatch, batch):
    export(str(mlp_onnx(tmp_path / "m.onnx", batch=batch)), tmp_path / "b", rank=4, measure=False)
    monkeypatch.chdir(tmp_path / "b")
    (code,) = re.findall(r"```python\n(.*?)```", card(tmp_path / "b"), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["outputs"][0].shape == (1 if batch == "batch" else batch, SIZES[-1])


def test_the_card_has_what_was_done_and_measured(bundle):
    text = card(bundle)
    for words in (
        "# m.onnx, compressed",
        "(rsi, q = 4, rank 6, seed 0)",
        "2 of 3 weights are split; nothing was retrained.",
        "| top-1 | 85.00 % |",
        "| latency, batch 1 |",
        f"- input `input: float32 (batch, {SIZES[0]})`",
        f"- output `output` (2, {SIZES[-1]}) for inputs (2, {SIZES[0]})",
        "- surgery (a full-rank split against the dense model",
        "- softmax bound, head split alone: top-1 unchanged for at least ",
        "| fc1 | Gemm | 32 x 12 | 6 | ",
        "| dense: excluded by --exclude fc2 |",
    ):
        assert words in text, words
    assert "None" not in text.replace("session.run(None", "")
    assert "nan" not in text


def test_tables_are_complete(bundle):
    lines = [line for line in card(bundle).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5, 10}
    assert len([line for line in lines if line.count("|") == 10]) == 2 + 3


def test_preprocessing_and_notes_are_on_the_card(tmp_path):
    steps = Preprocessing(mean=(0.5,), std=(0.25,))
    path = mlp_onnx(tmp_path / "m.onnx")
    export(str(path), tmp_path / "b", rank=4, measure=False, preprocessing=steps)
    assert f"Preprocessing: {steps.describe()}" in card(tmp_path / "b")
    assert "latency was not measured (--no-bench)" in card(tmp_path / "b")
