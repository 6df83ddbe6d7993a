import numpy as np
import pytest
from split_checks import graph, numbers, run

from graph_passes import Window, find_sites


def window(op: str, attributes: str, *kernel: int) -> Window:
    axes = len(kernel)
    signature = f"(float[N,2{',9' * axes}] x) => (float[N,2,{','.join('HWD'[:axes])}] y)"
    (site,) = find_sites(graph(f"y = {op}{attributes}(x, w)", signature=signature, w=numbers(2, 2, *kernel)))
    return site.window


def test_what_the_node_says():
    attributes = "<strides=[2,1], dilations=[1,3], pads=[1,2,3,4]>"
    expected = Window(kernel=(3, 2), strides=(2, 1), dilations=(1, 3), pads=(1, 2, 3, 4))
    assert window("Conv", attributes, 3, 2) == expected
    assert window("ConvTranspose", attributes, 3, 2) == expected
    assert expected.pads_over((9, 9)) == (1, 2, 3, 4)


def test_what_it_does_not_say():
    assert window("Conv", "", 3) == Window(kernel=(3,), strides=(1,), dilations=(1,), pads=(0, 0))
    assert window("Conv", '<auto_pad="VALID">', 3, 3).pads == (0, 0, 0, 0)
    assert window("Conv", '<auto_pad="NOTSET", pads=[1,0]>', 3).pads == (1, 0)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 7, 8])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_same_pads_are_those_of_onnxruntime(auto_pad, stride, size, kernel):
    def conv(attributes):
        signature = f"(float[1,1,{size}] x) => (float[1,1,L] y)"
        return graph(f"y = Conv<{attributes}, strides=[{stride}]>(x, w)", signature=signature, w=numbers(1, 1, kernel))

    dense, x = conv(f'auto_pad="{auto_pad}"'), numbers(1, 1, size)
    (site,) = find_sites(dense)
    assert site.window.pads == auto_pad
    pads = site.window.pads_over((size,))
    assert sum(pads) == 0 or sum(pads) < kernel
    came = run(conv(f"pads={list(pads)}"), x=x)
    assert np.array_equal(came, run(dense, x=x))
    if pads[0] != pads[1]:
        assert not np.array_equal(came, run(conv(f"pads={list(pads[::-1])}"), x=x))


def test_pads_that_follow_from_an_output_shape():
    own = window("ConvTranspose", "<strides=[2], output_shape=[18]>", 3)
    assert own.pads == "output_shape"
    with pytest.raises(ValueError, match="expected the window of a Conv, but got pads by output_shape"):
        own.pads_over((9,))
