"""onnxruntime's profile: every node counts its own time, and a Loop's body is not counted twice."""

import numpy as np
import onnx
import pytest
from onnx import parser

from rsi_deploy.benchmark.profiling import profile_models
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.runtime.profile_events import node_events, read_events


def event(name, op, start, duration, thread=1):
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": start,
        "dur": duration,
        "tid": thread,
        "args": {"op_name": op},
    }


def own(events):
    return {found.node: found.own for found in node_events(events)}


def test_a_loop_is_left_without_its_body():
    """Events are written as nodes end: the body's before the Loop's."""
    events = [
        event("before", "Relu", 5, 5),
        event("a", "MatMul", 11, 40),
        event("b", "Add", 60, 30),
        event("loop", "Loop", 10, 100),
        event("after", "Relu", 110, 7),
    ]
    assert own(events) == {"before": 5, "a": 40, "b": 30, "loop": 30, "after": 7}


def test_bodies_inside_bodies_are_taken_off_once():
    events = [
        event("deep", "MatMul", 30, 20),
        event("if", "If", 25, 30),
        event("beside", "Add", 60, 10),
        event("loop", "Loop", 20, 80),
    ]
    assert own(events) == {"deep": 20, "if": 10, "beside": 10, "loop": 40}
    assert sum(own(events).values()) == 80


def test_a_node_that_follows_at_once_is_no_part_of_the_loop():
    """Times are whole microseconds: it may begin when the Loop ends."""
    assert own([event("loop", "Loop", 10, 20), event("next", "MatMul", 30, 50)]) == {"loop": 20, "next": 50}


def test_what_another_thread_does_meanwhile_is_no_part_of_the_loop():
    events = [event("other", "MatMul", 12, 50, thread=2), event("a", "Add", 13, 4), event("loop", "Loop", 10, 70)]
    assert own(events) == {"other": 50, "a": 4, "loop": 66}


def test_a_profile_that_is_cut_off_is_a_full_disk(tmp_path):
    (tmp_path / "p.json").write_text('[{"cat": "Node"')
    with pytest.raises(OSError, match="cut off"):
        read_events(tmp_path / "p.json")


LOOP = """
<ir_version: 10, opset_import: ["" : 20]>
g (float[256,256] x) => (float[256,256] y) <int64 turns = {20}> {
   y = Loop(turns, , x) <body = b (int64 i, bool go, float[256,256] v) => (bool on, float[256,256] next) {
      on = Identity(go)
      h = MatMul(v, v)
      next = Tanh(h)
   }>
}
"""


def test_the_times_of_a_call_add_up_to_no_more_than_the_call(tmp_path):
    """Counted twice, a Loop of products takes nearly twice as long as the call that it is in."""
    onnx.save(parser.parse_model(LOOP), tmp_path / "m.onnx")
    feeds = {"x": np.full((256, 256), 1e-3, np.float32)}
    (profile,) = profile_models([tmp_path / "m.onnx"], ["a"], feeds, Runtime(provider="cpu", threads=1), calls=5)
    assert {"Loop", "MatMul", "Tanh"} <= profile.op_ms.keys()
    assert sum(profile.op_ms.values()) <= 1.5 * profile.call_ms
    assert profile.op_ms["Loop"] < profile.op_ms["MatMul"]
