"""Valid models and documents from which fuzzing starts. They are made when they are needed."""

import datetime
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from full_document import full_document
from onnx import ModelProto, numpy_helper

import rsi_deploy
from rsi_deploy.costing.cost_table import Conditions, CostTable, ModelTime, PlanCheck, SiteCost, SplitTime

TEXTS = {
    "matmul": """g (float[n,8] x) => (float[n,8] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Add(c, v) }""",
    "gemm": """g (float[n,8] x) => (float[n,8] y) { a = Gemm<transB = 1>(x, w, v) y = Gemm<alpha = 0.5>(a, w) }""",
    "conv": """g (float[n,4,6,6] x) => (float y) {
        a = Conv<pads = [1,1,1,1]>(x, k) b = BatchNormalization(a, s, s, s, s)
        c = Conv<group = 2, strides = [2,2]>(b, h) y = ConvTranspose(c, t) }""",
    "chain": """g (float[n,8] x) => (float y) {
        z = Reshape(f, q) p = Transpose<perm = [1,0]>(z) a = MatMul(x, p) y = Softmax(a) }""",
    "if": """g (float[n,8] x, bool c) => (float y) {
        y = If(c) <then_branch = t () => (float m) { m = MatMul(x, w) },
                   else_branch = e () => (float o) { o = Identity(x) }> }""",
    "shape": """g (float[n,8] x) => (float y) {
        e = Shape(x) o = ConstantOfShape(e) a = Mul(x, o) d = Constant<value_ints = [1, 2]>() y = Tile(a, d) }""",
    "function": """g (float[n,8] x) => (float[n,8] y) { a = local.f(x, w) y = local.f(a, w) }
        <domain: "local", opset_import: ["" : 17]> f (x, w) => (y) { a = MatMul(x, w) y = Relu(a) }""",
}


def weights() -> dict[str, np.ndarray]:
    """Return the weights of the models above by name."""
    random = np.random.default_rng(0)
    shapes = {"w": (8, 8), "v": (8,), "k": (4, 4, 3, 3), "s": (4,), "h": (6, 2, 1, 1), "t": (6, 3, 2, 2), "f": (64,)}
    made = {name: np.abs(random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return made | {"q": np.array([8, 8], np.int64)}


@functools.cache
def models() -> tuple[ModelProto, ...]:
    """Return a model of every family: products, convolutions, layout operators, branches, functions."""
    made = []
    for name, text in TEXTS.items():
        imports = '["" : 17, "local" : 1]' if name == "function" else '["" : 17]'
        proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {imports}> {text}")
        used = {each for node in proto.graph.node for each in node.input}
        used |= {each for node in proto.graph.node for a in node.attribute for n in a.g.node for each in n.input}
        proto.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in weights().items() if n in used)
        onnx.checker.check_model(proto)
        made.append(proto)
    return tuple(made)


@functools.cache
def bundle() -> Path:
    """Return the bundle of a small model, made once by `export`."""
    folder = Path(tempfile.mkdtemp(prefix="rsi-fuzz-"))
    onnx.save(models()[0], folder / "m.onnx")
    rsi_deploy.export(str(folder / "m.onnx"), folder / "b", rank=2, measure=False, allow_larger=True)
    return folder / "b"


@functools.cache
def documents() -> dict[str, tuple[dict, ...]]:
    """Return target -> valid documents."""
    report = json.loads((bundle() / "report.json").read_text())
    return {
        "report": (report,),
        "plan": (plan(),),
        "cost": (json.loads(costs().model_dump_json()),),
        "config": (
            preprocessing(),
            sweep(report),
            json.loads((bundle() / "manifest.json").read_text()),
            json.loads(full_document().model_dump_json()),
        ),
    }


def plan() -> dict:
    """Return a plan for the sites `w` and `k`."""
    sites = {"w": {"form": "matmul", "rank": 2, "reason": "asked"}, "k": {"form": "dense"}}
    return {"schema_version": 1, "tool": "t", "source_hash": "0" * 64, "sites": sites}


def costs() -> CostTable:
    """Return a cost table of two sites of one shape."""
    conditions = Conditions(
        cpu="a cpu", cores=2, cpu_flags=("avx2",), gpus=(), onnxruntime={"onnxruntime": "1"}, provider="cpu", threads=2
    )
    splits = tuple(
        SplitTime(form="matmul", rank=rank, nanoseconds=100 * rank, speedup_interval=(1.9, 2.1)) for rank in (1, 2, 4)
    )
    cost = SiteCost(signature="s", dense_nanoseconds=800, blocks=50, half_width=0.01, splits=splits)
    check = PlanCheck(scale=1.0, predicted=0.7, measured=0.75, measured_interval=(0.74, 0.76))
    return CostTable(
        tool="t",
        created=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        command="c",
        conditions=conditions,
        model=ModelTime(
            name="m", hash="0" * 64, batch=1, inputs={"x": "float32 (1, 8)"}, dense_nanoseconds=2000, checks=(check,)
        ),
        sites={"w": "s", "v": "s"},
        untimed={"k": "several nodes share its weight"},
        costs=(cost,),
        seconds=1.0,
        precision=0.02,
        notes=("a note",),
    )


def preprocessing() -> dict:
    """Return a preprocessing with every field."""
    steps = rsi_deploy.Preprocessing(resize=8, crop=(6, 6), mean=(0.5,), std=(0.2,))
    return steps.model_dump(mode="json")


def sweep(report: dict) -> dict:
    """Return a sweep of two points; no plan reaches the second one."""
    size = {"bytes": 700, "params": 60, "macs": 60}
    point = {"number": 1, "share": 0.5, "folder": "point-1", "size": size, "top1": 90.0, "splits": 2}
    return {
        **dict.fromkeys(("tool", "created", "command", "model", "source_hash", "settings"), "text"),
        "schema_version": 1,
        "by": "macs",
        "shares": [0.5, 0.1],
        "dense": {"bytes": 1000, "params": 100, "macs": 100},
        "dense_top1": 91.0,
        "points": [point, {"number": 2, "share": 0.1, "problem": "no plan reaches it"}],
        "environment": report["environment"],
    }
