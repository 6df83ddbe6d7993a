"""What a site tells a calibrator: the response is rebuilt from the data and compared with onnxruntime's."""

import itertools

import numpy as np
import pytest
from split_checks import error, graph, model, numbers, run
from test_split_conv import conv
from test_split_fused import contrib

from graph_passes import Dense, Site, Window, find_sites, joint_groups, split


def columns(x: np.ndarray, window: Window, groups: int) -> np.ndarray:
    """The data as the kernel sees it: (batch, *positions, groups, in * prod(kernel))."""
    batch, channels, *size = x.shape
    axes = len(size)
    pads = window.pads_over(size)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    counts = [(n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, window.strides, strict=True)]
    rows = np.empty((batch, *counts, channels, *window.kernel), x.dtype)
    for position in itertools.product(*map(range, counts)):
        taken = tuple(
            slice(p * s, p * s + span, d)
            for p, s, span, d in zip(position, window.strides, spans, window.dilations, strict=True)
        )
        rows[(slice(None), *position)] = x[(slice(None), slice(None), *taken)]
    return rows.reshape(batch, *counts, groups, -1)


def response(site: Site, data: np.ndarray) -> np.ndarray:
    """data @ weight^T as the site describes it."""
    if site.window is None:
        return data @ site.load()[0].T
    rows = columns(data, site.window, site.groups)
    out = np.einsum("...gi,goi->...go", rows, site.load())
    return np.moveaxis(out.reshape(*out.shape[:-2], -1), -1, 1)


@pytest.mark.parametrize("kernel", [[3], [2, 3], [1, 2, 2]])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pads", ["pads", "SAME_UPPER", "SAME_LOWER", "VALID"])
def test_the_response_of_a_conv(kernel, groups, pads):
    axes = len(kernel)
    own = f", pads={[1, 0, 2][:axes] + [0, 2, 1][:axes]}" if pads == "pads" else f', auto_pad="{pads}"'
    dilations = f", dilations={[2] * axes}" if not pads.startswith("SAME") else ""
    attributes = f", strides={[2, 1, 3][:axes]}{dilations}{own}"
    a_model, x = conv(groups=groups, into=2, out=3, kernel=kernel, attributes=attributes, bias=False)
    (site,) = find_sites(a_model)
    assert (site.data, site.output, site.plain, site.nested) == ("x", "y", True, False)
    came = response(site, x)
    assert error(came, run(a_model, x=x)) <= 1e-5
    assert error(np.flip(came, 1), run(a_model, x=x)) > 1e-2


PLAIN = {
    "MatMul": ("y = MatMul(x, w)", (6, 4), True),
    "MatMul, batch of one": ("y = MatMul(x, w)", (1, 6, 4), True),
    "MatMul, batched": ("y = MatMul(x, w)", (2, 6, 4), False),
    "MatMul, left": ("y = MatMul(w, x)", (4, 5), False),
    "FusedMatMul": ("y = com.microsoft.FusedMatMul(x, w)", (6, 4), True),
    "FusedMatMul, transB": ("y = com.microsoft.FusedMatMul<transB=1>(x, w)", (4, 6), True),
    "FusedMatMul, transA": ("y = com.microsoft.FusedMatMul<transA=1>(x, w)", (5, 4), False),
    "FusedMatMul, alpha": ("y = com.microsoft.FusedMatMul<alpha=2.0>(x, w)", (6, 4), False),
}


@pytest.mark.parametrize("case", PLAIN)
def test_the_response_of_a_product(case):
    body, weight, plain = PLAIN[case]
    a_model, x = contrib(body, "(float[2,5,6] x) => (float[A,B,C] y)", w=numbers(*weight)), numbers(2, 5, 6)
    (site,) = find_sites(a_model)
    assert (site.data, site.output, site.plain, site.window) == ("x", "y", plain, None)
    if plain:
        came, expected = response(site, x), run(a_model, x=x)
        assert error(came, expected) <= 1e-6
        assert error(2 * came, expected) > 0.9


@pytest.mark.parametrize(
    ("attributes", "inputs", "weight", "plain"),
    [
        ("beta=0.5, transB=1", "x, w, c", (4, 6), True),
        ("beta=0.5, transB=0", "x, w", (6, 4), True),
        ("alpha=0.5", "x, w", (6, 4), False),
        ("transA=1", "x, w", (3, 4), False),
        ("transA=0", "w, x", (4, 3), False),
    ],
)
def test_the_response_of_a_gemm(attributes, inputs, weight, plain):
    a_model, x = (
        graph(
            f"y = Gemm<{attributes}>({inputs})",
            signature="(float[3,6] x) => (float[M,N] y)",
            w=numbers(*weight),
            c=np.zeros(4, np.float32),
        ),
        numbers(3, 6),
    )
    (site,) = find_sites(a_model)
    assert (site.data, site.output, site.plain) == ("x", "y", plain)
    if plain:
        assert error(response(site, x), run(a_model, x=x)) <= 1e-6


def test_transposed_convolutions_are_not_plain_and_attention_is():
    signature = "(float[N,4,5] x) => (float[N,6,7] y)"
    (site,) = find_sites(graph("y = ConvTranspose<group=2>(x, w)", signature=signature, w=numbers(4, 3, 3)))
    assert (site.plain, site.window.kernel) == (False, (3,))
    signature = "(float[2,5,12] x) => (float[2,5,16] y)"
    (site,) = find_sites(contrib("y = com.microsoft.Attention<num_heads=4>(x, w)", signature, w=numbers(12, 48)))
    assert (site.plain, site.data, site.bias_size) == (True, "x", 48)


def test_names_are_those_of_the_values():
    a_model = graph("h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v)", w=numbers(6, 5), v=numbers(5, 4))
    assert [(site.data, site.output, site.nested) for site in find_sites(a_model)] == [
        ("x", "h", False),
        ("r", "y", False),
    ]


def test_nested_in_a_branch_and_in_a_function():
    values = ",".join(map(str, numbers(24)))
    constant = f"k = Constant<value = float[6,4] {{{values}}}>()"
    text = f"""<ir_version: 9, opset_import: ["" : 17, "local" : 1]> g (float[N,6] x) => (float[N,4] y) {{
        p = Constant<value = bool {{1}}>()  b = local.f(x)  a = MatMul(x, w)
        c = If (p) <
            then_branch = then_g () => (float[N,4] t) {{ t = MatMul(x, v) }},
            else_branch = else_g () => (float[N,4] e) {{ e = Identity(a) }}
        >  d = Add(a, b)  y = Add(c, d)
    }} <opset_import: ["" : 17], domain: "local"> f (a) => (c) {{ {constant}  c = MatMul(a, k) }}"""
    sites = find_sites(model(text, w=numbers(6, 4), v=numbers(6, 4, seed=1)))
    assert [(site.node, site.nested) for site in sites] == [("a", False), ("t", True), ("c", True)]


def test_a_joint_site():
    a_model = graph("q = MatMul(x, a)  k = Gemm(x, b)  y = Add(q, k)", a=numbers(6, 4), b=numbers(6, 4, seed=1))
    ((first, second),) = joint_groups(a_model)
    assert (first.data, second.data, first.plain, second.plain) == ("x", "x", True, True)
    seen = []
    split(a_model, lambda site: seen.append(site) or Dense(reason="looking"), joint=True)
    joint = seen[0]
    assert (joint.data, joint.output, joint.plain, joint.nested, joint.bias_size) == ("x", "q + k", True, False, 8)
    x = numbers(3, 6)
    assert error(response(joint, x).sum(), (x @ numbers(6, 4)).sum() + (x @ numbers(6, 4, seed=1)).sum()) <= 1e-5
