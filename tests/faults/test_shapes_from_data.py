"""Dynamic dimensions get their size from the data; without data, the message has shapes to type."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export, read_report
from rsi_deploy.cli import run
from rsi_deploy.core.errors import UsageError
from rsi_deploy.runtime.feeds.inputs import InputSpec
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.shapes import named_shapes, unsettled_inputs
from rsi_deploy.runtime.feeds.user_feeds import check_feeds
from rsi_deploy.sweeping.api import sweep

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 20, (64, 12))


def spec(name, *shape, dtype=np.float32):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def text_model(path):
    """Write a model of embedded tokens; `ids` and `kinds` have two dynamic dimensions."""
    nodes = [
        helper.make_node("Gather", ["e", "ids"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["m"], axes=[1], keepdims=0),
        helper.make_node("ReduceSum", ["kinds", "one"], ["k"], keepdims=1),
        helper.make_node("Add", ["m", "k"], ["y"]),
    ]
    weights = {
        "e": RNG.standard_normal((20, 64)).astype(np.float32),
        "w": RNG.standard_normal((64, 48)).astype(np.float32) / 8,
        "one": np.array([1]),
    }
    values = [
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "s"]),
            helper.make_tensor_value_info("kinds", TensorProto.FLOAT, ["n", "k"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 48])],
    ]
    graph = helper.make_graph(nodes, "g", *values, [numpy_helper.from_array(a, name) for name, a in weights.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text_model("m.onnx")
    kinds = RNG.standard_normal((64, 5)).astype(np.float32)
    np.savez("t.npz", ids=IDS, kinds=kinds)
    np.savez("d.npz", ids=IDS[:40, :7], kinds=kinds[:40, :2], labels=np.arange(40) % 12)
    np.savez("f.npz", ids=IDS[:3, :4], kinds=kinds[:3, :3])
    return tmp_path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"calib": "t.npz", "keep_macs": 0.6}, ((2, 12), (2, 5))),
        ({"calib": "t.npz", "keep_macs": 0.6, "data": "d.npz"}, ((2, 12), (2, 5))),
        ({"rank": "50%", "data": "d.npz"}, ((2, 7), (2, 2))),
        ({"rank": "50%", "feeds": "f.npz"}, ((3, 4), (3, 3))),
        ({"calib": "t.npz", "keep_macs": 0.6, "feeds": "f.npz"}, ((3, 4), (3, 3))),
        ({"calib": "t.npz", "keep_macs": 0.6, "input_shape": ["ids=1x9", "kinds=1x3"]}, ((1, 9), (1, 3))),
        ({"calib": "t.npz", "keep_macs": 0.6, "input_shape": ["ids=1x9"]}, ((1, 9), (1, 5))),
    ],
)
def test_the_source_of_the_shapes_of_an_export(here, options, expected):
    report = export("m.onnx", "b", measure=False, allow_shared_data=True, **options)
    assert (report.probe_shapes["ids"], report.probe_shapes["kinds"]) == expected
    steps = expected[0][1]
    assert report.dense.macs == steps * 64 * 48


def test_the_command_of_the_readme_and_verify(here, capsys):
    size = (here / "m.onnx").stat().st_size - 2000
    assert run(["export", "m.onnx", "--calib", "t.npz", "--max-size", f"{size}B", "--no-bench", "-o", "b"]) == 0
    assert run(["verify", "b"]) == 0
    assert "not checked  MACs" not in capsys.readouterr().out


def test_an_export_is_timed_with_the_requested_batch(here):
    options = {"bench_batch": 4, "bench_seconds": 0.1, "allow_slower": True}
    report = export("m.onnx", "b", calib="t.npz", keep_macs=0.6, **options)
    assert report.latency.inputs == {"ids": "int64 (4, 12)", "kinds": "float32 (4, 5)"}
    assert report.latency.batch == 4


def test_a_sweep_gets_its_shapes_from_data(here):
    found = sweep(
        "m.onnx",
        "s",
        calib="t.npz",
        points=2,
        allow_slower=True,
        bench_batch=3,
        bench_seconds=0.1,
        cost_budget=0.1,
        allow_larger=True,
    )
    assert found.side_by_side
    assert all(point.latency_ms for point in found.points)
    assert read_report(Path("s/point-01")).probe_shapes["ids"] == (2, 12)


def test_data_that_do_not_fit_are_the_reason_in_the_message(here):
    np.savez("bad.npz", ids=IDS * 1.0, kinds=np.ones((64, 5), np.float32))
    with pytest.raises(UsageError, match=r"^--calib: .*ids: int64 \(n, s\), but the data are float64"):
        export("m.onnx", "b", calib="bad.npz", keep_macs=0.6, measure=False)


def test_a_shape_and_different_feeds_are_refused(here):
    with pytest.raises(UsageError, match=r"ids is \(3, 4\) in --feeds, but \(1, 9\) in --input-shape"):
        export("m.onnx", "b", rank="50%", feeds="f.npz", input_shape=["ids=1x9"], measure=False)


@pytest.mark.parametrize(
    "specs",
    [
        [spec("ids", "n", "s", dtype=np.int64), spec("mask", "n", "s", dtype=np.int64)],
        [spec("ids", "n", "s", dtype=np.int64), spec("kinds", "n", "k")],
        [spec("x", "n", 3, "h", "w")],
        [spec("x", "n", None, None, 3)],
        [spec("x", None, None)],
        [spec("x", "b", "s", 16), spec("past", "b", "past_length", 12)],
        [spec("x", "t", "batch", 16), spec("state", 2, "batch", 12)],
        [spec("x", 1, "N", 3)],
        [spec("k"), spec("ids", "n", "s")],
    ],
)
def test_the_shapes_in_the_message_are_accepted(specs):
    """The shapes in the message are sufficient, and it names each input."""
    unsettled = unsettled_inputs(specs)
    for batch in (1,) if specs[0].shape[:1] == (1,) else (1, 2):
        with pytest.raises(UsageError, match=r"leaves ax[ie]s .* open; give its whole shape") as caught:
            random_feeds(specs, batch, 0)
        typed = re.findall(r"--input-shape (\S+)", str(caught.value))
        shapes = named_shapes(typed)
        assert set(shapes) <= unsettled
        assert "?" not in "".join(typed)
        feeds = random_feeds(specs, batch, 0, shapes)
        check_feeds(specs, feeds, "m.onnx")


def test_suggested_sizes():
    def typed(*dims, name="x"):
        with pytest.raises(UsageError) as caught:
            random_feeds([spec(name, *dims)], 2, 0)
        return re.search(r"--input-shape \S+=(\S+)", str(caught.value)).group(1)

    assert typed("n", "s") == "2x128"
    assert typed("n", 3, "h", "w") == "2x3x224x224"
    assert typed("n", "height", "width", 3) == "2x224x224x3"
    assert typed("n", 4, "past_length", 64, name="past_key") == "2x4x1x64"


def test_dimensions_fixed_by_a_shape_are_not_requested():
    specs = [spec("ids", "n", "s"), spec("mask", "n", "s"), spec("other", "n", "t")]
    assert unsettled_inputs(specs) == {"ids", "mask", "other"}
    assert unsettled_inputs(specs, {"ids": (1, 5)}) == {"other"}
    assert unsettled_inputs([spec("x", "n", 3), spec("k")]) == set()


def test_examples_follow_the_typed_shapes(here):
    feeds = probe_feeds(here / "m.onnx", 0, {"ids": (5, 3)}, None, {"ids": (1, 12), "kinds": (1, 4)})
    assert (feeds["ids"].shape, feeds["kinds"].shape) == ((5, 3), (5, 4))
