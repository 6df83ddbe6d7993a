import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from split_checks import (
    assert_same_at_full_rank,
    assert_sound,
    best_of_rank,
    error,
    graph,
    numbers,
    ops,
    run,
    truncated,
)

from graph_passes import Dense, find_sites, split


def conv(*, groups, into, out, kernel, attributes="", bias=True, size=7, change=lambda w: w):
    """A Conv of `into` and `out` channels a group, its weight changed; returns the model and the data."""
    axes = len(kernel)
    letters = ",".join("HWD"[:axes])
    dims = ",".join([str(groups * into), *[str(size)] * axes])
    constants = {"w": change(numbers(groups * out, into, *kernel))} | ({"c": numbers(groups * out)} if bias else {})
    model = graph(
        f"y = Conv<group={groups}{attributes}>(x, w{', c' if bias else ''})",
        signature=f"(float[N,{dims}] x) => (float[N,{groups * out},{letters}] y)",
        **constants,
    )
    return model, numbers(2, groups * into, *[size] * axes)


@given(
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    into=st.integers(1, 3),
    out=st.integers(1, 4),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    pad=st.one_of(st.integers(0, 2), st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"])),
    bias=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_conv_at_full_rank(kernel, groups, into, out, stride, dilation, pad, bias):
    axes = len(kernel)
    assume(not (isinstance(pad, str) and pad != "VALID" and dilation > 1))  # onnxruntime's SAME ignores dilation
    pads = f', auto_pad="{pad}"' if isinstance(pad, str) else f", pads={[pad, 0] * axes}"
    attributes = f", strides={[stride] * axes}, dilations={[dilation] * axes}{pads}"
    model, x = conv(groups=groups, into=into, out=out, kernel=kernel, attributes=attributes, bias=bias)
    (record,) = assert_same_at_full_rank(model, 1e-5, x=x)
    columns = into
    for length in kernel:
        columns *= length
    assert (record.groups, record.out_features, record.in_features) == (groups, out, columns)
    assert (record.rank, record.form) == (min(out, columns), "channel")


def test_first_takes_all_that_is_spatial_and_second_the_bias():
    attributes = ", kernel_shape=[3,3], strides=[2,1], pads=[1,0,1,0], dilations=[1,2]"
    model, _ = conv(groups=2, into=4, out=8, kernel=[3, 3], attributes=attributes)
    split(model, best_of_rank(3))
    first, second = model.graph
    assert first.attributes["strides"].as_ints() == (2, 1)
    assert first.attributes["kernel_shape"].as_ints() == (3, 3)
    assert len(first.inputs) == 2
    assert first.inputs[1].shape == (6, 4, 3, 3)
    assert [str(dim) for dim in first.outputs[0].shape] == ["N", "6", "H", "W"]
    assert set(second.attributes) == {"group", "kernel_shape"}
    assert second.attributes["group"].as_int() == 2
    assert second.inputs[1].shape == (16, 3, 1, 1)
    assert second.inputs[2].name == "c"
    assert ops(model) == {"Conv": 2}
    assert_sound(model)


@pytest.mark.parametrize(("groups", "rank"), [(1, 2), (1, 5), (3, 1), (3, 2)])
def test_low_rank_is_the_truncated_weight_group_by_group(groups, rank):
    def dense_with(change):
        model, x = conv(groups=groups, into=2, out=6, kernel=[3, 3], change=change)
        return run(model, x=x)

    model, x = conv(groups=groups, into=2, out=6, kernel=[3, 3])
    split(model, best_of_rank(rank))
    came = run(model, x=x)
    assert error(came, dense_with(lambda w: truncated(w.reshape(groups, 6, -1), rank).reshape(w.shape))) <= 1e-6
    assert error(came, dense_with(lambda w: w)) > 1e-2
    if groups > 1:  # one factorization over all groups is another function
        assert error(came, dense_with(lambda w: truncated(w.reshape(len(w), -1), rank).reshape(w.shape))) > 1e-2
    assert_sound(model)


def test_depthwise():
    model, x = conv(groups=4, into=1, out=1, kernel=[3, 3], attributes=", pads=[1,1,1,1]")
    (site,) = find_sites(model)
    assert (site.groups, site.out_features, site.in_features, site.full_rank) == (4, 1, 9, 1)
    assert site.break_even_rank < 1
    assert_same_at_full_rank(model, 1e-6, x=x)


def test_dense_answer_leaves_the_node_and_gives_the_reason():
    model, _ = conv(groups=1, into=2, out=3, kernel=[3])
    (skip,) = split(model, lambda site: Dense(reason="too small"))
    assert (skip.node, skip.weight, skip.reason, skip.in_features) == ("y", "w", "too small", 6)
    assert list(model.graph.initializers) == ["w", "c"]
