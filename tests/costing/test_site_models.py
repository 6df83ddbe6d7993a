"""Small models of one site: they compute what the site computes, and split as the whole model does."""

import signal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from flows import saved, text_model
from nets import run_onnx

from rsi_deploy.benchmark.statistics import MIN_BLOCKS
from rsi_deploy.benchmark.variants import Runtime
from rsi_deploy.costing import site_timing
from rsi_deploy.costing.site_models import Piece, pieces
from rsi_deploy.costing.site_timing import TimedShape, grid_of, shapes_of, time_sites
from rsi_deploy.costing.zero_filled import write_zero_filled
from rsi_deploy.io.onnx_file import read_onnx, write_onnx
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.float16 import float16_file
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.runtime.shape_trace import trace_run

CONVS = """
net (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y)
<float[8, 8, 3, 3] a, float[8] b, float[8, 8, 3, 3] c, float[8] d, float[8, 8, 3, 3] e, float[8] f>
{
    h = Conv<pads = [1, 1, 1, 1]>(x, a, b)
    r = Relu(h)
    g = Conv<pads = [1, 1, 1, 1]>(r, c, d)
    s = Add(g, x)
    t = Relu(s)
    k = Conv<pads = [1, 1, 1, 1]>(t, e, f)
    y = Relu(k)
}
"""
PRODUCTS = """
net (float[N, 5, 16] x) => (float[N, 5, 24] y)
<float[24, 16] w, float[24] b, float[24, 24] v>
{
    t = Transpose<perm = [1, 0]>(w)
    h = MatMul(x, t)
    s = Add(h, b)
    g = Gelu(s)
    y = MatMul(g, v)
}
"""


def cut(text, tmp_path, batch=3):
    path = tmp_path / "m.onnx"
    write_onnx(read_onnx(saved(text_model(text), tmp_path / "unnamed.onnx")), path)  # nodes have names then
    feeds = random_feeds(model_inputs(path), batch, 0)
    trace = trace_run(path, feeds)
    return path, {site.weight: piece for site, piece in pieces(ir.load(path), trace.inputs, trace.macs)}


def ops(model):
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


@pytest.mark.parametrize("text", [CONVS, PRODUCTS])
def test_a_float16_model_has_float16_pieces_where_its_nodes_run_in_float32(tmp_path, text):
    path, _ = cut(text, tmp_path)
    half = float16_file(path, tmp_path)
    feeds = random_feeds(model_inputs(half), 3, 0)
    trace = trace_run(half, feeds)
    found = [piece for _, piece in pieces(ir.load(half), trace.inputs, trace.macs)]
    assert len(found) > 1
    for piece in found:
        assert {dtype for dtype, _ in piece.feeds.values()} == {"float16"}
        make_session(piece.model())
        make_session(piece.model(piece.site.forms[0], 2))


def test_a_piece_is_the_site_with_what_is_fused_to_it(tmp_path):
    _, found = cut(CONVS, tmp_path)
    assert set(found) == {"a", "c", "e"}
    assert ops(found["a"].model())[:2] == ["Conv", "Relu"]
    assert ops(found["c"].model())[:3] == ["Conv", "Add", "Relu"]
    assert found["c"].feeds == {"r": ("float32", (3, 8, 6, 6)), "x": ("float32", (3, 8, 6, 6))}
    assert found["a"].macs == 3 * 8 * 36 * 72


def test_equal_shapes_are_one_and_other_surroundings_another(tmp_path):
    _, found = cut(CONVS, tmp_path)
    assert found["a"].signature == found["e"].signature != found["c"].signature
    _, other = cut(CONVS, tmp_path, batch=4)
    assert other["a"].signature != found["a"].signature
    assert len(shapes_of(found)) == 2


def test_a_weight_made_out_of_constants_brings_what_makes_it(tmp_path):
    _, found = cut(PRODUCTS, tmp_path)
    assert ops(found["w"].model())[:4] == ["Transpose", "MatMul", "Add", "Gelu"]
    assert ops(found["v"].model())[:1] == ["MatMul"]


@pytest.mark.parametrize("form", ["channel", "input", "separable"])
def test_it_splits_as_the_whole_model_does(form, tmp_path):
    path, found = cut(CONVS, tmp_path)
    piece = found["c"]
    small = onnx.load_from_string(piece.model(form, 4))
    assert ops(piece.model(form, 4))[:4] == ["Conv", "Conv", "Add", "Relu"]
    write_zero_filled(path, tmp_path / "blank.onnx", {"c": (form, 4)})
    whole = {t.name: tuple(t.dims) for t in onnx.load(tmp_path / "blank.onnx").graph.initializer}
    shapes = {tuple(t.dims) for t in small.graph.initializer}
    assert {shape for name, shape in whole.items() if name.startswith("c") and len(shape) == 4} <= shapes
    assert len([n for n in onnx.load(tmp_path / "blank.onnx").graph.node if n.op_type == "Conv"]) == 4


def test_every_small_model_runs_and_its_splits_give_outputs_of_the_same_shapes(tmp_path):
    for text in (CONVS, PRODUCTS):
        _, found = cut(text, tmp_path)
        for piece in found.values():
            feeds = piece.inputs()
            dense = make_session(piece.model()).run(None, feeds)
            assert len(dense) == piece.copies
            assert all(np.isfinite(y).all() and np.ptp(y) > 0 for y in dense)
            assert not np.allclose(dense[0], dense[-1]) or piece.copies == 1  # each copy has its own weight
            for form, rank in grid_of(piece):
                for before, after in zip(dense, make_session(piece.model(form, rank)).run(None, feeds), strict=True):
                    assert before.shape == after.shape


def test_a_split_that_is_none_is_refused(tmp_path):
    _, found = cut(PRODUCTS, tmp_path)
    with pytest.raises(ValueError, match="expected form"):
        found["v"].model("separable", 4)


def test_ranks_that_save_nothing_are_not_timed(tmp_path):
    _, found = cut(CONVS, tmp_path)
    for form, rank in grid_of(found["a"]):
        rows, columns = found["a"].site.shape(form)
        assert rank * (rows + columns) < 8 * 72


def test_blank_models_give_outputs_of_the_same_shape(tmp_path):
    path, _ = cut(CONVS, tmp_path)
    x = np.ones((2, 8, 6, 6), np.float32)
    write_zero_filled(path, tmp_path / "b.onnx", {"a": ("first", 2), "e": ("separable", 3)})
    (dense,), (blank,) = run_onnx(path, x), run_onnx(tmp_path / "b.onnx", x)
    assert dense.shape == blank.shape
    assert not np.allclose(dense, blank)
    assert [n.op_type for n in onnx.load(tmp_path / "b.onnx").graph.node].count("Conv") == 5


def test_times_are_of_every_variant_and_a_large_product_is_faster_at_a_small_rank(tmp_path):
    text = PRODUCTS.replace("16", "512").replace("24", "1024")
    _, found = cut(text, tmp_path, batch=8)
    piece = found["v"]
    wanted = TimedShape(piece=piece, splits=(("matmul", 8), ("matmul", 500)))
    (cost,) = time_sites([wanted], Runtime(threads=1), seconds=3, precision=0.05)
    assert [(s.form, s.rank) for s in cost.splits] == [("matmul", 8), ("matmul", 500)]
    assert cost.blocks >= MIN_BLOCKS
    assert cost.is_faster("matmul", 8)  # 64 times fewer multiplications
    assert cost.nanoseconds("matmul", 8) < cost.nanoseconds("matmul", 500)
    assert isinstance(piece, Piece)


def large(tmp_path):
    _, found = cut(PRODUCTS.replace("16", "512").replace("24", "1024"), tmp_path, batch=8)
    return shapes_of({"v": found["v"]})[found["v"].signature]


def test_a_shape_gets_the_finest_grid_that_its_time_allows(tmp_path):
    """More time never means fewer ranks; with none of it the coarsest grid is left, and every grid has its ends."""
    wanted = large(tmp_path)
    grids = (wanted.splits, *wanted.coarser)
    assert [len(splits) for splits in grids] == sorted({len(splits) for splits in grids}, reverse=True)
    chosen = [wanted.affordable(seconds, 10.0, 0.1).splits for seconds in (0.0, 1.0, 2.0, 4.0, 8.0, 100.0)]
    assert chosen[0] == grids[-1]
    assert chosen[-1] == grids[0]
    assert [len(splits) for splits in chosen] == sorted(len(splits) for splits in chosen)
    assert len(set(chosen)) == 3
    assert len(wanted.affordable(2.0, 1.0, 0.1).splits) > len(wanted.affordable(2.0, 10.0, 0.1).splits)


def test_a_shape_too_large_for_memory_gets_a_coarser_grid(tmp_path, monkeypatch):
    wanted = large(tmp_path)
    monkeypatch.setattr(site_timing, "GROUP_BYTES", wanted.bytes - 1)
    assert wanted.affordable(1e6, 1.0, 0.1).splits == wanted.coarser[0]


def test_with_no_time_the_coarsest_grid_is_timed(tmp_path):
    wanted = large(tmp_path)
    (cost,) = time_sites([wanted], Runtime(threads=1), seconds=1e-3, precision=0.05)
    assert tuple((s.form, s.rank) for s in cost.splits) == wanted.coarser[-1]
    assert cost.nanoseconds("matmul", 64) is not None
    assert cost.nanoseconds("matmul", 33) is None  # of a class that was not timed: no plan takes it


def test_an_interrupt_leaves_no_half_table(tmp_path, monkeypatch):
    """Ctrl-C while the shapes are timed, as the system sends it; what was timed until then is no cost."""
    wanted, turns, timed = large(tmp_path), [], site_timing.time_calls

    def interrupted(call, count):
        turns.append(count)
        if len(turns) == 3:
            signal.raise_signal(signal.SIGINT)
        return timed(call, count)

    monkeypatch.setattr(site_timing, "time_calls", interrupted)
    with pytest.raises(KeyboardInterrupt):
        time_sites([wanted], Runtime(threads=1), seconds=1e-3, precision=0.05)
    assert len(turns) == 3
