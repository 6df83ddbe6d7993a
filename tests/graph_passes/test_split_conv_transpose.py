import numpy as np
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

from graph_passes import find_sites, split


def conv_transpose(*, groups, into, out, kernel, attributes="", bias=True, size=5, change=lambda w: w):
    """A ConvTranspose of `into` and `out` channels a group, its weight changed; returns the model and the data."""
    axes = len(kernel)
    dims = ",".join([str(groups * into), *[str(size)] * axes])
    constants = {"w": change(numbers(groups * into, out, *kernel))} | ({"c": numbers(groups * out)} if bias else {})
    model = graph(
        f"y = ConvTranspose<group={groups}{attributes}>(x, w{', c' if bias else ''})",
        signature=f"(float[N,{dims}] x) => (float[N,{groups * out},{','.join('HWD'[:axes])}] y)",
        **constants,
    )
    return model, numbers(2, groups * into, *[size] * axes)


@given(
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    into=st.integers(1, 4),
    out=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pad=st.one_of(st.integers(0, 1), st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID", "output_shape"])),
    output_padding=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_conv_transpose_at_full_rank(kernel, groups, into, out, stride, dilation, pad, output_padding, bias):
    axes = len(kernel)
    attributes = f", strides={[stride] * axes}, dilations={[dilation] * axes}"
    assume(isinstance(pad, str) or min(kernel) > pad)
    if pad == "output_shape":
        attributes += f", output_shape={[5 * stride] * axes}"
        assume(all(stride * 4 + (k - 1) * dilation + 1 >= 5 * stride for k in kernel))
    elif isinstance(pad, str):
        attributes += f', auto_pad="{pad}"'
        assume(pad == "VALID" or all((k - 1) * dilation + 1 >= stride for k in kernel))
    else:
        attributes += f", pads={[pad, 0] * axes}"
    if output_padding and pad in (0, 1) and stride > 1:
        attributes += f", output_padding={[1] * axes}"
    model, x = conv_transpose(groups=groups, into=into, out=out, kernel=kernel, attributes=attributes, bias=bias)
    (record,) = assert_same_at_full_rank(model, 1e-5, x=x)
    rows = out * int(np.prod(kernel))
    assert (record.groups, record.out_features, record.in_features) == (groups, rows, into)
    assert (record.rank, record.form) == (min(rows, into), "input")


def test_second_keeps_every_attribute_and_the_bias():
    attributes = ", kernel_shape=[3,3], strides=[2,1], pads=[1,0,1,0], dilations=[1,2], output_padding=[1,0]"
    model, _ = conv_transpose(groups=2, into=6, out=4, kernel=[3, 3], attributes=attributes)
    before = {name: str(attribute) for name, attribute in model.graph[0].attributes.items()}
    split(model, best_of_rank(3))
    first, second = model.graph
    assert {name: str(attribute) for name, attribute in second.attributes.items()} == before
    assert second.inputs[1].shape == (6, 4, 3, 3)
    assert second.inputs[2].name == "c"
    assert set(first.attributes) == {"group", "kernel_shape"}
    assert first.inputs[1].shape == (6, 6, 1, 1)
    assert [str(dim) for dim in first.outputs[0].shape] == ["N", "6", "5", "5"]
    assert ops(model) == {"Conv": 1, "ConvTranspose": 1}
    assert_sound(model)


@pytest.mark.parametrize(("groups", "rank"), [(1, 2), (1, 4), (3, 1), (3, 2)])
def test_low_rank_is_the_truncated_weight_group_by_group(groups, rank):
    def dense_with(change):
        model, x = conv_transpose(groups=groups, into=5, out=3, kernel=[3, 2], change=change)
        return run(model, x=x)

    model, x = conv_transpose(groups=groups, into=5, out=3, kernel=[3, 2])
    split(model, best_of_rank(rank))
    came = run(model, x=x)
    assert error(came, dense_with(lambda w: truncated(w.reshape(groups, 5, -1), rank).reshape(w.shape))) <= 1e-6
    assert error(came, dense_with(lambda w: w)) > 1e-2
    if groups > 1:  # one factorization over all groups is another function
        assert error(came, dense_with(lambda w: truncated(w.reshape(len(w), -1), rank).reshape(w.shape))) > 1e-2
    assert_sound(model)


def test_weight_that_does_not_fit_its_groups():
    model, _ = conv_transpose(groups=1, into=3, out=2, kernel=[3])
    model.graph[0].attributes["group"] = type(model.graph[0].attributes["group"])("group", 2, 2)
    (skip,) = find_sites(model)
    assert skip.reason.startswith("weight of shape (3, 2, 3) does not fit a ConvTranspose of")
