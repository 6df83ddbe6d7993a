"""The way of one weight from the command line to its first product is short, and leads downwards only."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.overrides import TorchFunctionMode

import rsi_deploy
from graph_passes import split_all, split_pass
from rsi_deploy.cli import run

ROOT = Path(rsi_deploy.__file__).parent.parent
PRODUCTS = {"mm", "bmm", "matmul", "__matmul__", "addmm"}
WRAPPERS = {"<lambda>", "<listcomp>", "<genexpr>"}
START, END = "rsi_deploy/cli/export.py", "rsi_deploy/linalg/operand.py"


class FirstProduct(TorchFunctionMode):
    """Keeps the calls, as (file, function), that are on the stack at the first product with a weight of this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.calls = sorted(shape), []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        shapes = [sorted(a.shape[-2:]) for a in args if isinstance(a, torch.Tensor)]
        if not self.calls and getattr(function, "__name__", "") in PRODUCTS and self.shape in shapes:
            self.calls = stack()
        return function(*args, **(kwargs or {}))


def stack():
    """The project's functions on the stack, outermost first; without comprehensions and lambdas."""
    frame, calls = sys._getframe(2), []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = any(path.is_relative_to(ROOT / package) for package in ("rsi_deploy", "graph_passes"))
        if is_ours and frame.f_code.co_name not in WRAPPERS:
            calls.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_name))
        frame = frame.f_back
    return calls[::-1]


def one_gemm(path, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x, y = (
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", s])
        for n, s in (("x", shape[1]), ("y", shape[0]))
    )
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


@pytest.mark.parametrize("shape", [(640, 512), (96, 80)])  # by the Chebyshev route; in a batch, as small weights are
def test_from_the_command_to_the_first_product(tmp_path, shape):
    one_gemm(tmp_path / "model.onnx", shape)
    with FirstProduct(shape) as product:
        assert (
            run(["export", str(tmp_path / "model.onnx"), "--rank", "25%", "-o", str(tmp_path / "b"), "--no-bench"]) == 0
        )
    files = [file for file, _ in product.calls]
    # From the verb's own function to the kernel's product with the weight.
    way = product.calls[files.index(START) : files.index(END) if END in files else None]
    assert len(way) <= 13, way
    assert len({file for file, _ in way}) <= 10, way
    rooms = [file.split("/")[1] if file.startswith("rsi_deploy") else "graph_passes" for file, _ in way]
    levels = [order().index(room) for room in rooms]
    assert levels == sorted(levels), way


def order():
    """The rooms from the uppermost to the lowest; graph_passes lies below onnx_models."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rooms = list(next(contract["layers"] for contract in contracts if contract["type"] == "layers"))
    rooms.insert(rooms.index("onnx_models") + 1, "graph_passes")
    return rooms


@pytest.mark.parametrize(("how", "most"), [("plain", 3), ("calibrated", 7), ("torch", 3)])
def test_the_dense_model_is_parsed_once(tmp_path, monkeypatch, how, most):
    one_gemm(tmp_path / "model.onnx", (96, 80))
    parsed, surveyed = [], []
    read_bytes, survey = Path.read_bytes, split_all.survey

    def counted(model, *arguments, **options):
        surveyed.append(model)
        return survey(model, *arguments, **options)

    monkeypatch.setattr(Path, "read_bytes", lambda path: parsed.append(path.name) or read_bytes(path))
    for module in (split_all, split_pass):
        monkeypatch.setattr(module, "survey", counted)
    model, options = str(tmp_path / "model.onnx"), {"rank": "25%"}
    if how == "torch":
        model, options["input_shape"] = nn.Sequential(nn.Linear(80, 96)), (1, 80)
    if how == "calibrated":
        data = np.random.default_rng(1).standard_normal((200, 80)).astype(np.float32)
        options = {"keep_params": "60%", "calib": {"x": data}, "allow_broken": True}
    rsi_deploy.export(model, tmp_path / "b", measure=False, **options)
    assert parsed.count("dense.onnx") == 1
    # The dense model, and each graph that is split: the result, the surgery check, candidates, calibration's segments.
    assert len(surveyed) == len({id(model) for model in surveyed}) <= most
