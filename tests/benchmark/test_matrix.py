import json
import os
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.benchmark import blocks, matrix, variants
from rsi_deploy.benchmark.request import BenchRequest, matrix_shapes
from rsi_deploy.benchmark.result import BenchDocument, read_bench
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime.float16 import float16_file
from rsi_deploy.runtime.pinning import pinned

WEIGHTS = ", ".join(["0.5"] * 16)


def save(path, text):
    onnx.save(parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'), path)
    return path


@pytest.fixture
def model(tmp_path):
    text = f"g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {{{WEIGHTS}}}> {{ y = MatMul(x, w) }}"
    return save(tmp_path / "m.onnx", text)


@pytest.fixture
def tokens(tmp_path):
    """Several inputs of several types, two axes open."""
    return save(
        tmp_path / "tokens.onnx",
        "g (int64[N,L] ids, int64[N,L] attention_mask, bool[N] keep, float16[N] scale) => (float16[N,L] y, bool[N] k)"
        "{ a = Mul(ids, attention_mask)  b = Cast <to = 10> (a)  one = Constant <value = int64[1] {1}> ()"
        " s = Unsqueeze(scale, one)  y = Mul(b, s)  k = Not(keep) }",
    )


def request(*models, **more):
    models = models or (Path("a.onnx"),)
    labels = variants.variant_labels(models, None)
    return BenchRequest(models=models, labels=tuple(labels), seconds=more.pop("seconds", 0.05), **more)


# What is asked for.


def test_the_matrix_is_the_product():
    asked = request(batches=(1, 8), threads=(1, 2), shapes=matrix_shapes(["ids=Nx32,Nx64", "mask=Nx8"]), **{})
    settings = asked.settings()
    assert len(settings) == 8
    assert settings[0].name == "batch 1, ids 1x32, mask 1x8, 1 thread"
    assert settings[-1].name == "batch 8, ids 8x64, mask 8x8, 2 threads"
    assert request(pinned=(0, 1)).settings()[0].threads == 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: matrix_shapes(["1x2"]), "NAME=1x128"),
        (lambda: matrix_shapes(["a=1x2", "a=1x3"]), "a appears twice; join several shapes by commas"),
        (lambda: request(shapes=matrix_shapes(["a=1,2", "b=1,2,3"])).settings(), "a 2, b 3"),
    ],
)
def test_what_cannot_be_read_is_refused(call, said):
    with pytest.raises(UsageError, match=said):
        call()


# The matrix.


def test_a_document_holds_every_configuration(model, tmp_path):
    document = matrix.run_bench(request(model, model, batches=(1, 3), threads=(1, 2)), command="rsi-deploy bench m")
    assert [(cell.batch, cell.threads) for cell in document.cells] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert [cell.inputs["x"] for cell in document.cells] == ["float32 (1, 4)"] * 2 + ["float32 (3, 4)"] * 2
    assert [arm.label for arm in document.arms] == [str(model), f"{model} (2)"]
    assert document.arms[0].file_bytes == model.stat().st_size
    assert document.environment.affinity
    assert document.command == "rsi-deploy bench m"
    path = tmp_path / "r.json"
    path.write_text(document.model_dump_json())
    assert read_bench(path) == document
    changed = json.loads(path.read_text()) | {"schema_version": 2}
    path.write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="schema version 1: schema_version"):
        read_bench(path)
    with pytest.raises(UsageError, match="no such file"):
        read_bench(tmp_path / "none.json")
    assert not BenchDocument.model_validate(document.model_dump()).cold_start


def test_inputs_of_every_type_and_several_lengths(tokens):
    cells = matrix.run_bench(request(tokens, batches=(1, 2), shapes=matrix_shapes(["ids=Nx5,Nx9"]))).cells
    kinds = [(cell.inputs["ids"], cell.inputs["attention_mask"], cell.inputs["keep"]) for cell in cells]
    assert kinds[0] == ("int64 (1, 5)", "int64 (1, 5)", "bool (1,)")
    assert kinds[3] == ("int64 (2, 9)", "int64 (2, 9)", "bool (2,)")
    assert cells[0].inputs["scale"] == "float16 (1,)"
    with pytest.raises(UsageError, match="leaves axis 1 open; give its whole shape"):
        matrix.run_bench(request(tokens))


def test_given_samples_are_cut_to_the_batch(model):
    feeds = {"x": np.ones((5, 4), np.float32)}
    cells = matrix.run_bench(request(model, batches=(2, 5), feeds=feeds)).cells
    assert [cell.inputs["x"] for cell in cells] == ["float32 (2, 4)", "float32 (5, 4)"]
    with pytest.raises(UsageError, match="batch 8 needs as many samples of data, but got 5"):
        matrix.run_bench(request(model, batches=(8,), feeds=feeds))


def test_arms_with_other_outputs_are_refused(model, tmp_path):
    weights = f"<float[4,4] w = {{{WEIGHTS}}}>"
    other = save(tmp_path / "z.onnx", f"g (float[N,4] x) => (float[N,4] z) {weights} {{ z = MatMul(x, w) }}")
    twice = save(tmp_path / "t.onnx", "g (float[N,4] x) => (float[N,8] y) { y = Concat <axis = 1> (x, x) }")
    for wrong, said in ((other, r"z\.onnx gives z: float32"), (twice, r"t\.onnx gives y: float32 \(1, 8\)")):
        with pytest.raises(UsageError, match=said):
            matrix.run_bench(request(model, wrong))


def test_a_float16_variant_is_a_configuration(model):
    stored, half = matrix.run_bench(request(model, precisions=("stored", "float16"))).cells
    assert (stored.precision, half.precision) == ("stored", "float16")
    assert half.inputs == stored.inputs
    assert half.arms[0].model == str(model)
    assert half.name == "batch 1, float16"


def test_float16_halves_the_weights_and_keeps_the_ends(tmp_path):
    ones = ", ".join(["0.5"] * 4096)
    text = f"g (float[N,64] x) => (float[N,64] y) <float[64,64] w = {{{ones}}}> {{ y = MatMul(x, w) }}"
    big = save(tmp_path / "big.onnx", text)
    half = float16_file(big, tmp_path)
    assert half.stat().st_size < 0.6 * big.stat().st_size
    assert onnx.load(half).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert float16_file(big, tmp_path) != half
    with pytest.raises(UsageError, match="give the .onnx file"):
        float16_file(tmp_path / "m.ort", tmp_path)


def test_models_in_onnxruntimes_own_format(model, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(model), options)
    document = matrix.run_bench(request(model, tmp_path / "m.ort", profile=True))
    assert [arm.format for arm in document.arms] == ["onnx", "ort"]
    assert document.cells[0].arms[1].provider_nodes == {"CPUExecutionProvider": 1}


def test_external_weights_count(tmp_path, model):
    loaded = onnx.load(model)
    weight = loaded.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), weight.name))
    path = tmp_path / "outside.onnx"
    onnx.save(loaded, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    before = matrix.variant_file(path, "a")
    assert before.file_bytes == path.stat().st_size + (tmp_path / "w.bin").stat().st_size
    (tmp_path / "w.bin").write_bytes(bytes(64))
    assert matrix.variant_file(path, "a").sha256 != before.sha256


def test_ctrl_c_keeps_what_was_measured(model, monkeypatch):
    calls = []

    def run_block(cell):
        calls.append(cell.name)
        if len(calls) > 30:
            raise KeyboardInterrupt
        for arm in cell.variants:
            arm.visits.append(np.full(3, 1.0 + len(calls) % 3))
        cell.seconds += 1.0

    monkeypatch.setattr(blocks.Cell, "run_block", run_block)
    document = matrix.run_bench(request(model, model, batches=(1, 2), seconds=600, cold_start=True))
    assert document.partial
    assert {cell.stopped for cell in document.cells} == {"interrupted"}
    assert document.cold_start == ()
    calls.clear()
    monkeypatch.setattr(blocks.Cell, "run_block", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        matrix.run_bench(request(model))


def test_ctrl_c_in_a_separate_measurement_keeps_those_before(model, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix.concurrency, "measure_bursts", stopped)
    document = matrix.run_bench(request(model, memory=True, burst_gap=0.01))
    assert document.memory
    assert document.partial
    assert any("interrupted" in note for note in document.notes)


# Where the time goes, on a clock that was made up.


def made_up_cell(name, noise, now):
    rng = np.random.default_rng(len(name))

    def call():
        now[0] += int(30e6 * np.exp(rng.normal(0, noise)))

    made = [
        variants.Variant(label=str(i), model="", call=call, placement=None, call_ms=30.0, warm=True) for i in range(2)
    ]
    return blocks.Cell(name=name, variants=made)


def test_the_time_goes_where_the_intervals_are_widest(monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0] / 1e9)
    cells = [made_up_cell("calm", 0.01, now), made_up_cell("wild..", 0.3, now)]
    said = []
    assert not blocks.run_cells(cells, seconds=60, precision=0.02, seed=0, progress=lambda *a: said.append(a))
    calm, wild = cells
    assert calm.precise
    assert wild.seconds > 5 * calm.seconds
    assert calm.blocks >= 20
    assert {name for name, _ in said} == {"calm", "wild.."}
    assert 60 <= calm.seconds + wild.seconds < 61


def test_every_cell_gets_a_block_however_short_the_time(monkeypatch):
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0] / 1e9)
    cells = [made_up_cell("." * i, 0.1, now) for i in range(1, 6)]
    blocks.run_cells(cells, seconds=0.01, precision=0.02, seed=0)
    assert [cell.blocks for cell in cells] == [1] * 5


def test_a_budget_too_short_is_said(model):
    cells = matrix.run_bench(request(model, model, budget=0.001, batches=(1, 2))).cells
    assert all(cell.partial for cell in cells)
    assert all(any("20 take about" in note for note in cell.notes) for cell in cells)


# Cores.


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system cannot bind a process to cores")
def test_pinning_binds_and_lets_go(model):
    before = os.sched_getaffinity(0)
    core = min(before)
    with pinned((core,)):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(UsageError, match="may use the cores"), pinned((4096,)):
        pass
    (cell,) = matrix.run_bench(request(model, pinned=(core,))).cells
    assert (cell.pinned, cell.threads) == ((core,), 1)
    assert os.sched_getaffinity(0) == before


def test_a_system_that_cannot_pin_says_so(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pytest.raises(UsageError, match="cannot bind"), pinned((0,)):
        pass


def test_what_the_converter_cannot_do_is_said_with_the_model(tmp_path):
    """Two branches with a weight of the same name run, but onnxruntime's converter takes no such model."""
    text = """g (float[N,4] x, bool c) => (float[N,4] y) {
        y = If (c) <
            then_branch = a () => (float[N,4] p) <float[4] w = {1, 1, 1, 1}> { p = Mul(x, w) },
            else_branch = b () => (float[N,4] q) <float[4] w = {2, 2, 2, 2}> { q = Add(x, w) }
        >
    }"""
    with pytest.raises(ModelError, match=r"two\.onnx: .*float16: AssertionError; measure it with --dtype stored"):
        float16_file(save(tmp_path / "two.onnx", text), tmp_path)
