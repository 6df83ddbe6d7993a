"""An error message recommends only options of its verb, or names another verb before its option."""

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export
from rsi_deploy.cli import cli, run

FLOAT = TensorProto.FLOAT
W = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32), "w")


def written(path, *inputs, nodes=()):
    values = [helper.make_tensor_value_info(*value) for value in inputs]
    y = helper.make_tensor_value_info("y", FLOAT, [None, 48])
    graph = helper.make_graph([*nodes, helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values, [y], [W])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def open_length(path):
    return written(path, ("x", FLOAT, ["n", "length"]))


def fixed_batch(path):
    return written(path, ("x", FLOAT, [3, 64]))


def texts(path):
    return written(path, ("x", FLOAT, ["n", 64]), ("s", TensorProto.STRING, ["n"]))


def options_of(verb):
    return {name for parameter in cli.commands[verb].params for name in parameter.opts}


def foreign(verb, message):
    """Return the options in a message that neither the verb nor a verb named before them has."""
    wrong = []
    for found in re.finditer(r"(?:rsi-deploy )?(?:\b([a-z]+) )?(--[a-z][a-z-]*)", message):
        named, option = found.groups()
        if option not in options_of(verb) and option not in (options_of(named) if named in cli.commands else ()):
            wrong.append(option)
    return wrong


def test_an_option_of_another_verb_is_noticed():
    assert foreign("package", "give its whole shape: --input-shape x=1x64") == ["--input-shape"]
    assert not foreign("export", "give its whole shape: --input-shape x=1x64")
    assert not foreign("export", "rsi-deploy bench --allow-fallback measures it")


def commands(model, folder):
    data = folder / "d.npz"
    np.savez(data, x=np.ones((4, 64), np.float32), labels=np.zeros(4, np.int64))
    np.savez(folder / "bytes.npz", x=np.ones((4, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    small = ["--points", "2", "--no-bench"]
    yield "export", [model, "--rank", "50%", "--bench-batch", "2", "--bench-seconds", "0.1", "-o", folder / "e"]
    yield "export", [model, "--keep-params", "1%", "--calib", data, "--no-bench", "-o", folder / "k"]
    yield "export", [model, "--rank", "50%", "--data", folder / "bytes.npz", "--no-bench", "-o", folder / "i"]
    yield "sweep", [model, "--calib", data, *small, "-o", folder / "s"]
    yield "profile", [model, "--batch", "2", "--budget", "1s", "-o", folder / "c.json"]
    yield "inspect", [model, "--no-spectra"]
    yield "bench", [model, "--batch", "2", "--seconds", "0.1"]
    yield "bench", [model, "--data", folder / "bytes.npz", "--seconds", "0.1"]
    yield "eval", [model, "--data", data]
    yield "eval", [model, "--data", folder / "bytes.npz"]


def test_verbs_on_models_that_need_options(tmp_path, capsys):
    for make in (open_length, fixed_batch, texts):
        folder = tmp_path / make.__name__
        folder.mkdir()
        failed = 0
        for verb, arguments in commands(make(folder / "m.onnx"), folder):
            code = run([verb, *map(str, arguments)])
            message = capsys.readouterr().err
            assert code in (0, 2, 3), message
            assert "Traceback" not in message
            assert not foreign(verb, message if code else ""), f"{verb}: {message}"
            failed += code != 0
        assert failed > 2


def test_verbs_on_a_bundle(tmp_path, capsys):
    path = texts(tmp_path / "m.onnx")
    feeds = {"x": np.ones((2, 64), np.float32), "s": np.array(["a", "b"])}
    export(str(path), tmp_path / "b", rank="50%", feeds=feeds, measure=False)
    for target in ("triton", "ort", "ray-serve"):
        assert run(["package", str(tmp_path / "b"), "--target", target, "-o", str(tmp_path / target)]) == 2
        message = capsys.readouterr().err
        assert "--feeds" in message
        assert not foreign("package", message)
    assert run(["verify", str(tmp_path / "b")]) == 0
    assert "--feeds" in (message := capsys.readouterr().out)
    assert not [option for option in foreign("verify", message) if option not in ("--keep-dense",)]


def test_inputs_that_the_model_cannot_run(tmp_path, capsys):
    """The error of a failed run ends with advice for the verb."""
    row = helper.make_node("Gather", ["rows", "ids"], ["x"])
    path = written(tmp_path / "m.onnx", ("ids", TensorProto.INT64, ["n"]), nodes=[row])
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 64), np.float32), "rows"))
    onnx.save(model, path)
    np.savez(tmp_path / "d.npz", ids=np.full(4, 7), labels=np.zeros(4, np.int64))
    np.savez(tmp_path / "f.npz", ids=np.full(4, 7))
    for verb, arguments in (("bench", ["--feeds", tmp_path / "f.npz"]), ("eval", ["--data", tmp_path / "d.npz"])):
        assert run([verb, str(path), *map(str, arguments)]) == 3
        message = capsys.readouterr().err
        assert "give inputs that fit it" in message
        assert ("--feeds" in message) == (verb == "bench")
        assert not foreign(verb, message), message
