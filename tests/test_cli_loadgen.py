"""`rsi-deploy bench --loadgen` and provider options, as typed."""

import importlib.util
import json

import pytest

from bench import small
from rsi_deploy.benchmark.mlperf import loadgen
from rsi_deploy.cli import run

needs_loadgen = pytest.mark.skipif(
    importlib.util.find_spec("mlperf_loadgen") is None, reason="pip install mlcommons-loadgen"
)


@pytest.fixture
def model(tmp_path):
    return str(small.perceptron(tmp_path / "m.onnx", width=16, layers=2))


def bench(*arguments):
    return run(["bench", *map(str, arguments), "--seconds", "0.1"])


@needs_loadgen
def test_its_verdict_is_shown_and_stored(model, capsys):
    assert bench(model, "--loadgen", "singlestream", "--provider", "cpu:threads=1") == 0
    shown = capsys.readouterr().out
    assert "LoadGen SingleStream: VALID" in shown or "LoadGen SingleStream: INVALID" in shown
    assert "p90 of the same calls by this tool's clock" in shown
    assert bench(model, "--loadgen", "Offline", "--loadgen", "MultiStream", "--batch", "2", "--json") == 0
    (results,) = json.loads(capsys.readouterr().out)["loadgen"].values()
    assert [result["scenario"] for result in results] == ["Offline", "MultiStream"]
    assert {result["batch"] for result in results} == {2}


@pytest.fixture
def _nothing_is_measured(monkeypatch):
    from rsi_deploy.benchmark import matrix

    monkeypatch.setattr(matrix, "run_bench", lambda *_, **__: pytest.fail("it was measured"))


@pytest.mark.usefixtures("_nothing_is_measured")
def test_what_it_cannot_do_is_told_before_anything_is_measured(model, capsys, monkeypatch):
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: object())
    assert bench(model, "--loadgen", "Server", "--batch", "8") == 2
    assert "take --batch 1" in capsys.readouterr().err
    monkeypatch.setattr(loadgen.importlib.util, "find_spec", lambda name: None)
    assert bench(model, "--loadgen", "Server") == 2
    assert "pip install 'rsi-deploy[loadgen]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("cpu:thread=2", "'thread' does not exist; every provider takes threads"),
        ("cpu:threads", "takes NAME:key=value"),
        ("teapot:a=1", "'teapot:a=1' is not offered by the installed onnxruntime"),
    ],
)
def test_provider_options_that_do_not_exist_are_usage_errors(model, capsys, provider, said):
    assert bench(model, "--provider", provider) == 2
    assert said in capsys.readouterr().err


def test_provider_options_in_force_are_stored(model, capsys):
    assert bench(model, "--provider", "cpu:spinning=off,arena=off,threads=1", "--json") == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["provider_options"] == {"spinning": "off", "arena": "off", "threads": "1"}
