"""The command line as a user meets it: streams, exit codes, messages."""

import json
import re
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
import torch
from nets import SIZES, labelled, mlp_onnx
from safetensors.torch import save_file
from torch import nn

from rsi_deploy.cli import cli, run
from rsi_deploy.evaluation.predictor import Predictor
from rsi_deploy.runtime import doctor as diagnosis
from rsi_deploy.runtime.providers import available_providers

VERBS = sorted(cli.commands)
FACTORY = f"""
from torch import nn

def make():
    net = nn.Sequential(nn.Linear({SIZES[0]}, 32), nn.ReLU(), nn.Linear(32, {SIZES[-1]}))
    net.input_shape = (1, {SIZES[0]})
    return net

def shapeless():
    return nn.Sequential(nn.Linear(12, 32))

def failing():
    raise RuntimeError("no such file")

def number():
    return 7

THREE = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a model, a factory, checkpoints and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_factory", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", tmp_path / "m.onnx")
    (tmp_path / "cli_factory.py").write_text(FACTORY)
    net = nn.Sequential(nn.Linear(SIZES[0], 32), nn.ReLU(), nn.Linear(32, SIZES[-1]))
    save_file(net.state_dict(), tmp_path / "good.safetensors")
    return tmp_path


@pytest.fixture
def bundle(here, capsys):
    assert run(["export", "m.onnx", "--rank", "6", "-o", "b", "--no-bench", "--keep-dense"]) == 0
    capsys.readouterr()
    return here / "b"


def messages(capsys, code, argv):
    """What a command that fails says: nothing on stdout, one readable message on stderr."""
    assert run([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.strip()
    return err


# -- light


@pytest.mark.parametrize("argv", [[], *([verb] for verb in VERBS)], ids=lambda argv: " ".join(argv) or "none")
def test_help(argv, capsys):
    assert run([*argv, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: rsi-deploy")
    assert err == ""


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, rsi_deploy\n"
        "from rsi_deploy.cli import run\n"
        f"codes = [run([*v, '--help']) for v in ([], *([v] for v in {VERBS}))] + [run(['--version'])]\n"
        "assert not any(codes), codes\n"
        "heavy = {'torch', 'torchvision', 'onnxruntime', 'onnx', 'onnx_ir', 'onnxscript', 'numpy', 'PIL'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stderr == ""


def test_the_installed_command_ends_with_its_exit_code():
    command = [sys.executable, "-c", "from rsi_deploy.cli import main; main()"]
    done = subprocess.run([*command, "export", "m.onnx", "--rank", "0.4", "-o", "b"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rsi-deploy: --rank 0.4 could be a rank or a ratio: write --rank 40%\n"


def test_version(capsys):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"rsi-deploy, version \d+\.\d+\.\d+\n", capsys.readouterr().out)


# -- what goes where


def test_results_go_to_stdout_and_no_bar_to_a_pipe(here, capsys):
    assert run(["export", "m.onnx", "--rank", "25%", "-o", "b", "--bench-seconds", "0.05", "--data", "d.npz"]) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("[0:") for line in err.splitlines()), "lines for a log, no bar"
    for words in (
        "fc1",
        "parameters",
        "MACs a sample",
        "latency, batch 1",
        "top-1",
        "surgery",
        "verdict: ",
        "bundle: b",
    ):
        assert words in out


def test_lines_are_for_a_log_and_bars_for_a_terminal(here, capsys, monkeypatch):
    from rsi_deploy.exporting import api as pipeline

    seen, real = [], pipeline.export
    monkeypatch.setattr(pipeline, "export", lambda *a, **k: (seen.append(k["progress"]), real(*a, **k))[1])
    argv = ["export", "m.onnx", "--rank", "4", "-o", "b", "--no-bench", "--force"]
    assert run(argv) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "load: " in line]
    assert all(line.startswith("[0:") for line in lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(argv) == 0
    assert "[0:0" not in capsys.readouterr().err
    assert all(map(callable, seen))


def test_export_json_is_one_document_of_the_schema(here, capsys):
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    argv = ["export", "m.onnx", "--rank", "25%", "-o", "b", "--bench-seconds", "0.05", "--data", "d.npz", "--json"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("[0:") for line in err.splitlines()), "progress alone"
    report = json.loads(out)
    jsonschema.validate(report, schema)
    assert report == json.loads((here / "b" / "report.json").read_text())
    assert report["latency"]
    assert report["accuracy"]
    for wrong in ({"schema_version": 2}, {"sites": 3}, {"unknown": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(report | wrong, schema)


@pytest.mark.parametrize(
    ("argv", "keys"),
    [
        (["inspect", "m.onnx"], {"model", "rank", "sites", "notes"}),
        (["eval", "m.onnx", "--data", "d.npz"], {"top1", "samples"}),
        (["bench", "m.onnx", "m.onnx", "--seconds", "0.05"], {"schema_version", "cells", "accuracy"}),
        (["doctor"], {"environment", "providers", "findings"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_of_every_verb(here, capsys, argv, keys):
    assert run([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out).keys() >= keys


# -- the verbs on files and bundles


def test_eval_takes_a_file_or_a_bundle(bundle, capsys):
    assert run(["eval", "m.onnx", "--data", "d.npz"]) == 0
    out = capsys.readouterr().out
    assert "85.00 % [73.89, 91.90]" in out
    assert "top-1" in out
    assert "same answer" not in out, "there is no reference"
    assert run(["eval", "b", "--data", "d.npz", "--reference", "m.onnx"]) == 0
    out = capsys.readouterr().out
    assert "compared with m.onnx" in out
    assert "of 60: less accurate (p < 0.0001)" in out
    assert (
        run(["eval", "b", "--data", "d.npz", "--reference", "m.onnx", "--limit", "20", "--batch", "7", "--json"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 20
    assert 0 <= result["agreement"] <= 100


def test_eval_interrupted_tells_what_it_saw(here, capsys, monkeypatch):
    outputs, calls = Predictor.outputs, []

    def then_stop(self, feeds):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return outputs(self, feeds)

    monkeypatch.setattr(Predictor, "outputs", then_stop)
    assert run(["eval", "m.onnx", "--data", "d.npz", "--batch", "10", "--json"]) == 130
    out, err = capsys.readouterr()
    assert (json.loads(out)["samples"], json.loads(out)["partial"]) == (20, True)
    assert "interrupted" in err


def test_bench_of_a_matrix_and_the_rest(bundle, capsys):
    argv = ["bench", "m.onnx", "b", "--seconds", "0.05", "--batch", "1,3", "--threads", "1,2", "--memory", "--profile"]
    assert run([*argv, "--bursts", "1ms", "--streams", "1,2", "--throughput"]) == 0
    out = capsys.readouterr().out
    for said in ("batch 3, 2 threads", "Resident memory", "Bursts of 8", "streams on", "Throughput", "op type"):
        assert said in out
    assert run([*argv, "--budget", "1s", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["cells"]) == 4
    assert document["command"] == "rsi-deploy " + " ".join([*argv, "--budget", "1s", "--json"])


def test_bench_interrupted_tells_what_it_saw(here, capsys, monkeypatch):
    from rsi_deploy.benchmark.blocks import Cell

    run_block, calls = Cell.run_block, []

    def then_stop(self):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        run_block(self)

    monkeypatch.setattr(Cell, "run_block", then_stop)
    assert run(["bench", "m.onnx", "--seconds", "60", "--json"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert document["partial"]
    assert document["cells"][0]["stopped"] == "interrupted"


def test_bench_takes_files_and_bundles(bundle, capsys):
    argv = ["bench", "m.onnx", "b", "--seconds", "0.1", "--batch", "3", "--threads", "1", "--data", "d.npz"]
    assert run(argv) == 0
    out = capsys.readouterr().out
    assert "batch 3, 1 thread" in out
    assert "85.00 % [73.89, 91.90]" in out
    assert "same answer" in out
    assert run([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [arm["label"] for arm in result["cells"][0]["arms"]] == ["m.onnx", "b"]
    assert result["accuracy"].keys() == {"m.onnx", "b"}


def test_bench_of_a_model_against_itself(here, capsys):
    assert run(["bench", "m.onnx", "m.onnx", "--seconds", "0.1", "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["cells"][0]["arms"]
    assert len({arm["label"] for arm in arms}) == 2


def test_verify(bundle, capsys):
    assert run(["verify", "b"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "holds  outputs" in out
    (bundle / "model.onnx").unlink()
    assert run(["verify", "b"]) == 4
    out, err = capsys.readouterr()
    assert "broken  files" in out
    assert err == "rsi-deploy: b: manifest, files not as reported; export (or package) again\n"


def test_inspect(here, capsys):
    assert run(["inspect", "m.onnx", "--rank", "8", "--exclude", "fc2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "export --rank 8" in out
    assert "dense: excluded by --exclude fc2" in out
    assert "1 of 3 sites would be split" in out


def test_a_factory_with_a_checkpoint(here, capsys):
    argv = ["export", "cli_factory:make", "--checkpoint", "good.safetensors", "--rank", "25%", "-o", "b", "--no-bench"]
    assert run(argv) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "exporter" in out
    report = json.loads((here / "b" / "report.json").read_text())
    assert report["source"]["model"] == "cli_factory:make"
    assert report["notes"] == []


# -- doctor


def test_doctor(capsys):
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "problem" not in out
    assert "CPUExecutionProvider" in out


def test_doctor_finds_onnxruntimes_that_overwrite_each_other(monkeypatch, capsys):
    both = {"onnxruntime": "1.23.0", "onnxruntime-gpu": "1.22.0"}
    monkeypatch.setattr(diagnosis, "onnxruntime_distributions", lambda: both)
    assert run(["doctor"]) == 3
    out, err = capsys.readouterr()
    assert "onnxruntime 1.23.0, onnxruntime-gpu 1.22.0" in out
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in out
    assert err == "rsi-deploy: this installation has problems; see above for what to type\n"


def test_doctor_finds_that_there_is_none_or_that_an_import_fails(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "onnxruntime_distributions", dict)
    real = diagnosis.importlib.import_module

    def import_module(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name)

    monkeypatch.setattr(diagnosis.importlib, "import_module", import_module)
    assert run(["doctor"]) == 3
    out = capsys.readouterr().out
    assert "no onnxruntime is installed" in out
    assert "import torchvision fails: operator torchvision::nms does not exist" in out
    assert "pip install torch torchvision (together, so that they match)" in out


# -- bad input: the code, and words that help


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        ("0", "--rank must be at least 1, but got '0'"),
        ("-3", "--rank must be at least 1, but got '-3'"),
        ("101%", "--rank as a ratio must lie in (0 %, 100 %], but got '101%'"),
        ("0%", "--rank as a ratio must lie in"),
        ("-5%", "--rank as a ratio must lie in"),
        ("0.4", "write --rank 40%"),
        ("64.0", "write a rank such as 64, or a ratio such as 40%"),
        ("abc", "--rank must be a rank such as 64 or a ratio such as 40%, but got 'abc'"),
        ("", "but got ''"),
        ("nan", "but got 'nan'"),
        ("25", "--rank 25 is above the full rank of every site (the largest is 24)"),
        ("99999999999999999999", "is above the full rank of every site"),
    ],
)
@pytest.mark.parametrize("verb", ["export", "inspect"])
def test_ranks_that_cannot_be_meant(here, capsys, verb, rank, words):
    output = ["-o", "b", "--no-bench"] if verb == "export" else []
    assert words in messages(capsys, 2, [verb, "m.onnx", f"--rank={rank}", *output])
    assert not (here / "b").exists()


def export_of(*argv, rank="25%"):
    return ["export", *argv, "--rank", rank, "-o", "b", "--no-bench"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (export_of("torchvision:resnet81", "--weights", "none"), "no model 'resnet81'; near names: resnet"),
        (export_of("nowhere.onnx"), "no such file: nowhere.onnx"),
        (export_of("nowhere.pt2"), "no such file: nowhere.pt2"),
        (export_of("nonsense"), "is none of torchvision:NAME, package.module:factory, FILE.pt2, FILE.onnx"),
        (export_of("d.npz"), "is none of torchvision:NAME"),
        (export_of("no_module:make"), "cannot import 'no_module'"),
        (export_of("cli_factory:mak"), "cli_factory has no factory 'mak'; near names: make"),
        (export_of("cli_factory:THREE"), "cli_factory has no factory 'THREE'"),
        (export_of("cli_factory:shapeless"), "add --input-shape, such as --input-shape 1x3x224x224"),
        (export_of("cli_factory:make", "--input-shape", "1,12"), "must be positive numbers joined by x"),
        (export_of("cli_factory:make", "--input-shape", "1x-12"), "must be positive numbers joined by x"),
        (export_of("cli_factory:make", "--checkpoint", "nowhere.pth"), "no checkpoint at nowhere.pth"),
        (export_of("m.onnx", "--checkpoint", "good.safetensors"), "--checkpoint goes with a factory"),
        (export_of("m.onnx", "--opset", "99"), "--opset must be between 1 and"),
        (export_of("m.onnx", "--data", "nowhere.npz"), "nowhere.npz does not exist"),
        (export_of("m.onnx", "--data", "m.onnx"), "neither an .npz, .parquet or .arrow file nor a folder"),
        (export_of("m.onnx", "--data", "wide.npz"), "the data are float32 (samples, 13)"),
        (export_of("m.onnx", "--data", "range.npz"), "the labels range from 0 to 10"),
        (export_of("m.onnx", "--data", "unlabelled.npz"), "--data has no labels"),
        (export_of("m.onnx", "--data", "pictures.npz"), "does not say how 8-bit images become that"),
        (export_of("m.onnx", "--data", "d.npz", "--mean", "0.5", "--std", "0.5"), "no preprocessing applies"),
        (export_of("m.onnx", "--mean", "0.5"), "mean has 1 values and std has 0"),
        (export_of("m.onnx", "--mean", "a,b", "--std", "1,1"), "--mean takes numbers joined by commas"),
        (export_of("m.onnx", "--resize", "0"), "--resize takes pixels such as 224 or 224x224"),
        (export_of("m.onnx", "--provider", "nonsense"), "provider 'nonsense' is not offered"),
        (export_of("m.onnx", "--include", "nothing*"), "--include 'nothing*' matches none of the 3 sites"),
        (["export", "m.onnx", "--rank", "4", "-o", "full", "--no-bench"], "or delete full yourself"),
        (["export", "m.onnx", "--rank", "4", "-o", "full", "--no-bench", "--force"], "or delete full yourself"),
        (["sweep", "m.onnx", "--calib", "d.npz", "-o", "full", "--force"], "or delete full yourself"),
        (["export", "m.onnx", "--rank", "4", "-o", "m.onnx", "--no-bench"], "is a file; -o takes a folder"),
        (["export", "m.onnx", "--rank", "4", "-o", "m.onnx/b", "--no-bench"], "cannot write into"),
        (["export", "m.onnx", "-o", "b"], "give exactly one of --rank, --max-error, --keep-params"),
        (["export", "m.onnx", "--rank", "4"], "Missing option '-o'"),
        (export_of("m.onnx", "--seed", "-1"), "--seed"),
        (export_of("m.onnx", "--power-iterations", "0"), "--power-iterations"),
        (export_of("m.onnx", "--method", "magic"), "--method"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["eval", "m.onnx"], "Missing option '--data'"),
        (["eval", "nowhere", "--data", "d.npz"], "no such model: nowhere"),
        (["eval", "full", "--data", "d.npz"], "no ONNX file in full"),
        (["eval", "m.onnx", "--data", "unlabelled.npz"], "nothing to compare the answers with"),
        (["eval", "m.onnx", "--data", "range.npz"], "the labels range from 0 to 10"),
        (["bench", "m.onnx", "--batch", "0"], "--batch takes numbers of 1 or more"),
        (["bench", "m.onnx", "--precision", "2"], "--precision takes a percentage"),
        (["bench", "m.onnx", "--budget", "soon"], "--budget takes a time"),
        (["bench", "m.onnx", "--pin", "x"], "--pin takes core numbers"),
        (["bench", "m.onnx", "--dtype", "int8"], "--dtype takes stored, float16"),
        (["bench", "m.onnx", "--memory-limit", "5"], "--memory-limit takes a size"),
        (["bench", "m.onnx", "--data", "d.npz", "--batch", "99"], "needs as many samples of data, but got 60"),
        (["bench", "m.onnx", "nowhere.onnx"], "no such model: nowhere.onnx"),
        (["bench", "m.onnx", "--data", "nowhere.npz"], "nowhere.npz does not exist"),
        (["bench", "m.onnx", "--data", "unseen.npz"], "store ready inputs in the data, or time it without --data"),
        (["bench", "m.onnx", "--input-shape", "1x12"], "takes NAME=1x128"),
        (["bench", "m.onnx", "--input-shape", "other=1x12"], "no input named other"),
        (["bench", "m.onnx", "other.onnx", "--seconds", "0.1"], "other.onnx takes"),
        (["bench"], "Missing argument"),
        (["verify", "full"], "is no bundle: it has no report.json"),
        (["inspect", "torchvision:vgg99"], "near names: vgg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(here, capsys, argv, words):
    (here / "full").mkdir()
    (here / "full" / "mine.txt").write_text("mine")
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((30, SIZES[0])).astype(np.float32), np.arange(30) % 10
    np.savez("wide.npz", x=np.pad(x, ((0, 0), (0, 1))), labels=labels)
    np.savez("range.npz", x=x, labels=np.arange(30) % 11)
    np.savez("unlabelled.npz", x=x)
    np.savez("pictures.npz", images=rng.integers(0, 256, (30, 3, 4), np.uint8), labels=labels)
    np.savez("unseen.npz", images=np.load("pictures.npz")["images"])  # pictures without labels are timed alone
    mlp_onnx("other.onnx", sizes=(13, 32, 24, 10))
    err = messages(capsys, 2, argv)
    assert words in err
    assert not (here / "b").exists()
    assert [p.name for p in (here / "full").iterdir()] == ["mine.txt"]
    assert not list(here.glob(".*partial*"))


@pytest.mark.skipif("CUDAExecutionProvider" in available_providers(), reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("verb", ["export", "eval", "bench", "verify"])
def test_a_provider_that_is_not_installed(bundle, capsys, verb):
    argv = {"export": export_of("m.onnx"), "eval": ["eval", "b", "--data", "d.npz"]}.get(verb, [verb, "b"])
    argv = [a if a != "b" or verb != "export" else "c" for a in argv]
    err = messages(capsys, 2, [*argv, "--provider", "cuda"])
    assert "provider 'cuda' is not offered by the installed onnxruntime; available: " in err
    assert "pip uninstall onnxruntime && pip install onnxruntime-gpu" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there(here, capsys):
    assert "type --device cpu" in messages(capsys, 2, [*export_of("m.onnx"), "--device", "cuda"])


class Anything:
    """Only a full pickle can bring this back."""


def wrong_checkpoints():
    good = nn.Sequential(nn.Linear(SIZES[0], 32), nn.ReLU(), nn.Linear(32, SIZES[-1])).state_dict()
    torch.save({k: v for k, v in good.items() if k != "2.bias"} | {"extra.weight": torch.ones(1)}, "keys.pth")
    torch.save(good | {"2.weight": torch.ones(10, 31)}, "shapes.pth")
    torch.save({"model": Anything()}, "pickle.pth")
    torch.save([1, 2, 3], "list.pth")
    with open("text.pth", "w") as file:
        file.write("<html>not found</html>")
    with open("cut.safetensors", "wb") as file, open("good.safetensors", "rb") as whole:
        file.write(whole.read()[:200])


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("keys.pth", ["1 missing: 2.bias", "1 unexpected: extra.weight"]),
        ("shapes.pth", ["2.weight (10, 31), the model has (10, 32)"]),
        ("pickle.pth", ["executing its pickle, which is refused", "Anything", "python -c"]),
        ("list.pth", ["no state dict"]),
        ("text.pth", ["is not a torch.save file"]),
        ("cut.safetensors", ["is not a readable safetensors file"]),
    ],
)
def test_checkpoints_that_do_not_fit(here, capsys, checkpoint, words):
    wrong_checkpoints()
    err = messages(capsys, 3, export_of("cli_factory:make", "--checkpoint", checkpoint))
    assert checkpoint in err
    assert all(word in err for word in words)


def test_factories_that_fail(here, capsys):
    assert "failed: RuntimeError: no such file" in messages(capsys, 3, export_of("cli_factory:failing"))
    assert "must return a torch.nn.Module, but returned int" in messages(capsys, 3, export_of("cli_factory:number"))


@pytest.mark.parametrize("content", [b"", b"not a protobuf at all", bytes(200)], ids=["empty", "text", "zeros"])
@pytest.mark.parametrize("verb", ["export", "inspect", "eval", "bench"])
def test_files_that_are_no_models(here, capsys, verb, content):
    (here / "bad.onnx").write_bytes(content)
    (here / "bad.pt2").write_bytes(content)
    argv = {"export": export_of("bad.onnx"), "inspect": ["inspect", "bad.onnx"], "bench": ["bench", "bad.onnx"]}
    assert "bad.onnx" in messages(capsys, 3, argv.get(verb, ["eval", "bad.onnx", "--data", "d.npz"]))
    if verb == "export":
        assert "bad.pt2 is not a readable torch.export archive" in messages(capsys, 3, export_of("bad.pt2"))


def test_a_model_cut_in_the_middle(here, capsys):
    whole = (here / "m.onnx").read_bytes()
    (here / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    messages(capsys, 3, export_of("cut.onnx"))
    assert not (here / "b").exists()


def test_a_failing_run_of_the_unforeseen_is_a_defect_of_ours(here, monkeypatch):
    """Code 1 is Python's own, with the traceback that a report needs."""
    monkeypatch.setattr("rsi_deploy.exporting.api.export", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(export_of("m.onnx"))


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "rsi_deploy", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(",")[0]) == (0, "rsi-deploy")
