import copy
import math
import pickle

import onnx
import pytest
import torch
from torch import nn

from graph_passes.forms import unfold, unfolded_shape
from rsi_deploy.linalg.pivoting import PivotedFactors, pivoted
from rsi_deploy.linalg.solver import Factors
from rsi_deploy.torch_models.layers import (
    LowRankConv,
    LowRankLinear,
    LowRankMultiheadAttention,
    OpenMultiheadAttention,
    PivotedConv,
    PivotedLinear,
    PivotedMultiheadAttention,
    changed_bias,
)
from tests.nets import run_onnx

RANK = 3
EMBED, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 3, 5, 7


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def assert_factors_learn(layer, names):
    """The last backward reached the named parameters."""
    for name in names:
        gradient = layer.get_parameter(name).grad
        assert gradient is not None, name
        assert float(gradient.abs().max()) > 0, name


# -- Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4, 6), (0, 6)], ids=str)
def test_linear_equals_the_dense_layer_of_its_weight(shape, bias):
    low = LowRankLinear(Factors(normal(10, RANK), normal(RANK, 6)), normal(10) if bias else None)
    dense = nn.Linear(6, 10, bias=bias).double()
    dense.weight.data = low.weight.detach()
    if bias:
        dense.bias.data = low.bias.detach()
    x = normal(*shape)
    assert_equal(low(x), dense(x))


def test_linear_rejects_a_transposed_factor():
    left, right, x = normal(6, 6), normal(6, 6), normal(4, 6)
    expected = nn.functional.linear(x, left @ right)
    assert_equal(LowRankLinear(Factors(left, right), None)(x), expected)
    for wrong in (Factors(left.T, right), Factors(left, right.T), Factors(right, left)):
        with pytest.raises(AssertionError):
            assert_equal(LowRankLinear(wrong, None)(x), expected)


def test_linear_learns_and_has_a_description():
    low = LowRankLinear(Factors(normal(10, RANK), normal(RANK, 6)), normal(10))
    low(normal(4, 6)).square().sum().backward()
    assert_factors_learn(low, ("left", "right", "bias"))
    assert repr(low) == "LowRankLinear(in_features=6, out_features=10, rank=3)"
    assert list(low.state_dict()) == ["left", "right", "bias"]


def test_linear_takes_over_a_parameter_and_copies_nothing_else():
    bias = nn.Parameter(normal(10))
    left = normal(10, RANK)
    low = LowRankLinear(Factors(left, normal(RANK, 6)), bias)
    assert low.bias is bias
    assert low.left.data_ptr() == left.data_ptr()


# -- Conv

CONVS = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d same": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "1d circular": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "2d": (nn.Conv2d, {"kernel_size": 3}),
    "2d pointwise": (nn.Conv2d, {"kernel_size": 1}),
    "2d oblong": (nn.Conv2d, {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "2d strided": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d dilated": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    "2d same": (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same"}),
    "2d valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "2d grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "2d grouped strided": (nn.Conv2d, {"kernel_size": 3, "groups": 4, "stride": 2, "padding": 1, "bias": False}),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"}),
    "2d circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}),
    "2d replicate same": (nn.Conv2d, {"kernel_size": (3, 4), "padding": "same", "padding_mode": "replicate"}),
    "3d": (nn.Conv3d, {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "stride": (1, 2, 1)}),
    "3d circular": (nn.Conv3d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}),
}


def low_rank_conv(conv, rank=2):
    out_features = conv.out_channels // conv.groups
    factors = Factors(normal(conv.groups, out_features, rank), normal(conv.groups, rank, conv.weight[0].numel()))
    return LowRankConv(conv, factors), factors


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("case", CONVS)
def test_conv_equals_the_dense_layer_of_its_weight(case):
    kind, options = CONVS[case]
    conv = kind(4, 8, **options).double()
    low, factors = low_rank_conv(conv)
    dense = copy.deepcopy(conv)
    dense.weight.data = low.weight.detach()
    assert_equal(low.weight.reshape(conv.groups, 8 // conv.groups, -1), factors.left @ factors.right)
    x = normal(2, 4, *([9] * (conv.weight.ndim - 2)))
    assert_equal(low(x), dense(x))
    assert_equal(low(x[0]), dense(x[0]))  # without a batch


@pytest.mark.parametrize("case", ["1d", "2d strided", "2d grouped", "3d circular"])
def test_conv_learns(case):
    kind, options = CONVS[case]
    low, _ = low_rank_conv(kind(4, 8, **options).double())
    low(normal(2, 4, *([9] * (low.left.ndim - 2)))).square().sum().backward()
    assert_factors_learn(low, ("left", "right", "bias"))


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_rejects_wrong_factors(groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups).double()
    low, (left, right) = low_rank_conv(conv)
    x = normal(2, 4, 6, 6)
    expected = low(x)
    turned = right.reshape(groups, 2, -1, 3, 3).transpose(-1, -2).reshape(right.shape)  # a transposed kernel
    wrong = [Factors(left, turned), Factors(left.flip(-1), right)]
    if groups > 1:
        wrong.append(Factors(left.flip(0), right))
    for factors in wrong:
        with pytest.raises(AssertionError):
            assert_equal(LowRankConv(conv, factors)(x), expected)


def test_conv_has_a_description():
    low, _ = low_rank_conv(nn.Conv2d(4, 8, 3, stride=2, groups=2))
    assert repr(low) == "LowRankConv(4, 8, rank=2, kernel_size=(3, 3), stride=(2, 2), groups=2)"


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize(
    ("case", "form"),
    [(case, form) for case in CONVS for form in ("channel", "input", "separable")[: 3 if "2d" in case else 2]],
)
def test_conv_forms_equal_the_dense_layer_of_their_weight(case, form):
    kind, options = CONVS[case]
    conv = kind(4, 8, **options).double()
    rows, columns = unfolded_shape(8 // conv.groups, 4 // conv.groups, conv.kernel_size, form)
    factors = Factors(normal(conv.groups, rows, 2), normal(conv.groups, 2, columns))
    change = normal(8)
    low = LowRankConv(conv, factors, form, bias_change=change)
    weight = low.weight.detach()
    apart = weight.reshape(conv.groups, 8 // conv.groups, *weight.shape[1:])
    assert_equal(torch.from_numpy(unfold(apart.numpy(), form).copy()), factors.left @ factors.right)
    dense = copy.deepcopy(conv)
    dense.weight.data = weight
    dense.bias = nn.Parameter(change if conv.bias is None else conv.bias.detach() + change)
    x = normal(2, 4, *([9] * len(conv.kernel_size)))
    assert_equal(low(x), dense(x))
    assert_equal(low(x[0]), dense(x[0]))
    low(x).square().sum().backward()
    assert_factors_learn(low, ("left", "right", "bias"))
    without = LowRankConv(conv, factors, form)
    assert without.bias is conv.bias
    with pytest.raises(AssertionError):
        assert_equal(without(x), dense(x))
    if min(conv.kernel_size) > 1:
        with pytest.raises(AssertionError):
            assert_equal(LowRankConv(conv, Factors(factors.left.flip(1), factors.right), form)(x), without(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["channel", "input", "separable"])
@pytest.mark.parametrize("case", ["2d oblong", "2d grouped strided", "2d same"])
def test_conv_forms_are_two_convs_in_onnx_with_the_same_numbers(case, form, tmp_path):
    kind, options = CONVS[case]
    conv = kind(4, 8, **options)
    rows, columns = unfolded_shape(8 // conv.groups, 4 // conv.groups, conv.kernel_size, form)
    factors = Factors(torch.randn(conv.groups, rows, 2), torch.randn(conv.groups, 2, columns))
    low = LowRankConv(conv, factors, form).eval()
    x = torch.randn(2, 4, 9, 9)
    torch.onnx.export(low, (x,), tmp_path / "low.onnx", dynamo=True, verbose=False)
    ops = [node.op_type for node in onnx.load(tmp_path / "low.onnx").graph.node]
    assert ops.count("Conv") == 2
    (found,) = run_onnx(tmp_path / "low.onnx", {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), low(x).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.from_numpy(found), low(x.flip(-1)).detach(), rtol=1e-4, atol=1e-4)


# -- pivoted

PLACES = {"first": [0, 1, 2], "last": [7, 8, 9], "scattered": [5, 0, 8], "first in another order": [1, 0, 2]}


def pivoted_at(pivots, rows=10, columns=6):
    """Factors of one group whose left one has the rows of the identity at `pivots`."""
    left = normal(1, rows, len(pivots))
    left[0, pivots] = torch.eye(len(pivots), dtype=left.dtype)
    return PivotedFactors(left, normal(1, len(pivots), columns), torch.tensor([pivots]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", PLACES)
def test_a_pivoted_linear_equals_the_plain_one_of_its_factors(places, bias):
    factors, own = pivoted_at(PLACES[places]), normal(10) if bias else None
    plain, low = LowRankLinear(Factors(factors.left[0], factors.right[0]), own), PivotedLinear(factors, own)
    assert_equal(low.weight, plain.weight)
    assert (low.order.index is None) == (places in ("first", "last"))
    assert sum(p.numel() for p in low.parameters()) == RANK * (10 + 6 - RANK) + 10 * bias
    for shape in ((6,), (4, 6), (2, 3, 4, 6), (0, 6)):
        x = normal(*shape)
        assert_equal(low(x), plain(x))
    x = normal(4, 6)
    low.order.pivots = low.order.pivots.roll(1)
    low.order.arrange_()
    with pytest.raises(AssertionError):
        assert_equal(low(x), plain(x))


def test_pivots_elsewhere_are_refused():
    factors = pivoted_at([5, 0, 8])
    for wrong in ([0, 5, 8], [5, 0, 7]):
        with pytest.raises(ValueError, match="identity"):
            PivotedLinear(factors._replace(pivots=torch.tensor([wrong])), None)
    with pytest.raises(ValueError, match="other rows"):
        PivotedLinear(pivoted_at([0, 1, 2], rows=3), None)


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@pytest.mark.parametrize("case", CONVS)
def test_a_pivoted_conv_equals_the_plain_one_of_its_factors(case):
    kind, options = CONVS[case]
    conv = kind(4, 8, **options).double()
    rows, columns = 8 // conv.groups, conv.weight[0].numel()
    rank = min(2, rows - 1)
    factors = pivoted(normal(conv.groups, rows, rank), normal(conv.groups, rank, columns))
    change = normal(8)
    plain = LowRankConv(conv, Factors(factors.left, factors.right), bias_change=change)
    low = PivotedConv(conv, factors, bias_change=change)
    assert low.left.numel() + low.right.numel() == conv.groups * rank * (rows + columns - rank)
    assert_equal(low.weight, plain.weight)
    x = normal(2, 4, *([9] * (conv.weight.ndim - 2)))
    assert_equal(low(x), plain(x))
    assert_equal(low(x[0]), plain(x[0]))
    low(x).square().sum().backward()
    assert_factors_learn(low, ("left", "right", "bias"))
    without = PivotedConv(conv, factors)
    assert without.bias is conv.bias
    assert_equal(without(x), LowRankConv(conv, Factors(factors.left, factors.right))(x))
    low.order.pivots = low.order.pivots.flip(0)
    if len(low.order.pivots) > 1:
        with pytest.raises(AssertionError):
            assert_equal(low(x), plain(x))


def test_a_state_dict_brings_its_pivots_along():
    layers = {places: PivotedLinear(pivoted_at(at), normal(10)) for places, at in PLACES.items()}
    x = normal(4, 6)
    for source in layers.values():
        for target in map(copy.deepcopy, layers.values()):
            if target.left is not source.left:
                target.load_state_dict(source.state_dict())
            assert torch.equal(target(x), source(x))
            again = pickle.loads(pickle.dumps(target))
            assert torch.equal(again(x), source(x))
    first, last = copy.deepcopy(layers["first"]), layers["last"]
    first.load_state_dict({**last.state_dict(), "order.pivots": first.order.pivots})
    assert not torch.allclose(first(x), last(x))


def test_a_training_step_keeps_the_pivots_and_changes_the_parameters():
    low = PivotedLinear(pivoted_at([5, 0, 8]), normal(10))
    before = copy.deepcopy(low.state_dict())
    low(normal(4, 6)).square().sum().backward()
    torch.optim.SGD(low.parameters(), lr=0.1).step()
    changed = {key for key, value in low.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"left", "right", "bias"}


def test_a_pivoted_layer_computes_in_the_dtype_of_autocast():
    low = PivotedLinear(pivoted_at([5, 0, 8]), normal(10)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert low(torch.randn(4, 6)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("places", ["last", "scattered"])
@pytest.mark.parametrize("groups", [None, 1, 2], ids=["linear", "conv", "grouped conv"])
def test_pivoted_layers_are_two_products_and_a_concat_in_onnx(groups, places, tmp_path):
    if groups is None:
        low, x = PivotedLinear(pivoted_at(PLACES[places]), normal(10)), torch.randn(2, 6)
    else:
        parts = [pivoted_at(PLACES[places], columns=36 // groups) for _ in range(groups)]
        factors = PivotedFactors(*(torch.cat(each) for each in zip(*parts, strict=True)))
        low = PivotedConv(nn.Conv2d(4, 10 * groups, 3, groups=groups, padding=1), factors)
        x = torch.randn(2, 4, 9, 9)
    low.float().eval()
    torch.onnx.export(low, (x,), tmp_path / "low.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "low.onnx").graph
    ops = [node.op_type for node in graph.node]
    assert ops.count("Gemm" if groups is None else "Conv") == 2
    assert ops.count("Concat") == 1
    assert ops.count("Gather") == (groups == 2 or places == "scattered")
    numbers = sum(
        math.prod(i.dims) for i in graph.initializer if len(i.dims) > 1 and i.data_type == onnx.TensorProto.FLOAT
    )
    assert sum(p.numel() for p in (low.left, low.right)) <= numbers < low.weight.numel()
    (found,) = run_onnx(tmp_path / "low.onnx", {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), low(x).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.from_numpy(found), low(x.flip(-1)).detach(), rtol=1e-4, atol=1e-4)


# -- biases


def test_a_bias_changes_only_if_required():
    bias, change = nn.Parameter(normal(5)), normal(5)
    frozen = nn.Parameter(normal(5), requires_grad=False)
    assert changed_bias(bias, None) is bias
    assert changed_bias(None, None) is None
    assert_equal(changed_bias(None, change).detach(), change)
    assert_equal(changed_bias(bias, change).detach(), bias.detach() + change)
    assert changed_bias(bias, change).requires_grad
    assert not changed_bias(frozen, change).requires_grad
    assert changed_bias(nn.Parameter(torch.zeros(5).half()), change.float()).dtype == torch.float16


# -- MultiheadAttention


def attention(**options):
    """A low-rank module and the dense one whose packed weight is its product."""
    dense = nn.MultiheadAttention(EMBED, HEADS, **options).double().eval()
    if dense.in_proj_bias is not None:
        dense.in_proj_bias.data = normal(3 * EMBED)  # torch starts with zeros, which would hide a mistake
        dense.out_proj.bias.data = normal(EMBED)
    factors = Factors(normal(3 * EMBED, RANK), normal(RANK, EMBED))
    low = LowRankMultiheadAttention(dense, factors).eval()
    dense.in_proj_weight.data = low.in_proj_weight.detach()
    return low, dense


def inputs(batch_first, cross, batched=True):
    query, key, value = normal(BATCH, LENGTH, EMBED), normal(BATCH, SOURCE, EMBED), normal(BATCH, SOURCE, EMBED)
    if not cross:
        key = value = query
    if not batched:
        query, key, value = query[0], key[0], value[0]
        return (query, key, value) if cross else (query, query, query)
    if batch_first:
        return query, key, value
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    return (query, key, value) if cross else (query, query, query)


def boolean(*shape):
    """True masks out; the first source position always stays."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def masks(source, batched=True):
    n = BATCH if batched else 1
    padding = boolean(n, source) if batched else boolean(source)
    return {
        "none": {},
        "bool 2-D": {"attn_mask": boolean(LENGTH, source)},
        "float 2-D": {"attn_mask": normal(LENGTH, source)},
        "bool 3-D": {"attn_mask": boolean(n * HEADS, LENGTH, source)},
        "float 3-D": {"attn_mask": normal(n * HEADS, LENGTH, source)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": normal(*padding.shape)},
        "bool and padding": {"attn_mask": boolean(LENGTH, source), "key_padding_mask": padding},
        "float 3-D and padding": {
            "attn_mask": normal(n * HEADS, LENGTH, source),
            "key_padding_mask": normal(*padding.shape),
        },
    }


def assert_same_results(low, dense, arguments, **options):
    found, found_weights = low(*arguments, **options)
    expected, expected_weights = dense(*arguments, **options)
    assert_equal(found, expected)
    assert (found_weights is None) == (expected_weights is None)
    if expected_weights is not None:
        assert_equal(found_weights, expected_weights)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("weights", ["mean", "each head", "none"])
@pytest.mark.parametrize("mask", masks(SOURCE))
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("layout", ["batch first", "sequence first", "unbatched"])
def test_attention_equals_the_dense_module_of_its_weight(layout, cross, mask, weights):
    low, dense = attention(batch_first=layout == "batch first")
    opened = OpenMultiheadAttention(dense)
    batched = layout != "unbatched"
    arguments = inputs(layout == "batch first", cross, batched)
    options = masks(SOURCE if cross else LENGTH, batched)[mask]
    options |= {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    assert_same_results(low, dense, arguments, **options)
    assert_same_results(opened, dense, arguments, **options)
    with torch.no_grad():  # torch's fast path, where it takes it
        assert_same_results(low, dense, arguments, **options)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_a_causal_mask_and_its_hint(need_weights):
    low, dense = attention(batch_first=True)
    arguments = inputs(True, cross=False)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    assert_same_results(low, dense, arguments, attn_mask=mask, is_causal=True, need_weights=need_weights)
    with pytest.raises(AssertionError):
        assert_equal(low(*arguments, attn_mask=mask, is_causal=True)[0], dense(*arguments)[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_refuses_the_hint_alone_as_torch_does(need_weights):
    low, dense = attention()
    for module in (low, dense):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(*inputs(False, cross=False), is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("cross", [False, True])
def test_attention_without_bias(cross):
    low, dense = attention(bias=False, batch_first=True)
    assert_same_results(low, dense, inputs(True, cross))


def test_attention_where_only_key_and_value_are_one():
    low, dense = attention(batch_first=True)
    query, key, _ = inputs(True, cross=True)
    assert_same_results(low, dense, (query, key, key))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_drops_out_in_training_alone(need_weights):
    low, _ = attention(dropout=0.5, batch_first=True)
    arguments = inputs(True, cross=False)
    still = low(*arguments, need_weights=need_weights)[0]
    assert_equal(low(*arguments, need_weights=need_weights)[0], still)
    low.train()
    with pytest.raises(AssertionError):
        assert_equal(low(*arguments, need_weights=need_weights)[0], still)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_learns(cross, need_weights):
    low, _ = attention(batch_first=True)
    low(*inputs(True, cross), need_weights=need_weights)[0].square().sum().backward()
    assert_factors_learn(low, ("in_proj_left", "in_proj_right", "in_proj_bias", "out_proj.weight"))


@pytest.mark.parametrize("bias", [False, True])
def test_an_open_attention_calls_its_layers_and_shares_their_parameters(bias):
    _, dense = attention(bias=bias, batch_first=True)
    opened, seen = OpenMultiheadAttention(dense), []
    assert opened.in_proj.weight is dense.in_proj_weight
    assert opened.in_proj.bias is dense.in_proj_bias
    assert opened.out_proj is dense.out_proj
    assert not opened.training
    opened.in_proj.register_forward_hook(lambda *_: seen.append("in_proj"))
    handle = opened.out_proj.register_forward_hook(lambda *_: seen.append("out_proj"))
    assert_same_results(opened, dense, inputs(True, cross=False))
    assert seen == ["in_proj", "out_proj"]
    assert_same_results(opened, dense, inputs(True, cross=True))
    assert seen == ["in_proj", "out_proj", "out_proj"]
    handle.remove()


@pytest.mark.parametrize("bias", [False, True])
def test_attention_with_another_bias(bias):
    _, dense = attention(bias=bias, batch_first=True)
    factors, change = Factors(normal(3 * EMBED, RANK), normal(RANK, EMBED)), normal(3 * EMBED)
    low, plain = (LowRankMultiheadAttention(dense, factors, bias_change=c).eval() for c in (change, None))
    assert plain.in_proj_bias is dense.in_proj_bias
    assert_equal(low.in_proj_bias.detach(), change + (dense.in_proj_bias.detach() if bias else 0))
    arguments = inputs(True, cross=False)
    with pytest.raises(AssertionError):
        assert_equal(low(*arguments)[0], plain(*arguments)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_a_pivoted_attention_equals_the_plain_one_of_its_factors(cross, bias):
    _, dense = attention(bias=bias, batch_first=True)
    factors = pivoted(normal(1, 3 * EMBED, RANK), normal(1, RANK, EMBED))
    low = PivotedMultiheadAttention(dense, factors).eval()
    plain = LowRankMultiheadAttention(dense, Factors(factors.left[0], factors.right[0])).eval()
    assert_equal(low.in_proj_weight, plain.in_proj_weight)
    assert low.in_proj_bias is plain.in_proj_bias
    assert sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in low.parameters()) == RANK**2
    arguments = inputs(True, cross)
    assert_equal(low(*arguments)[0], plain(*arguments)[0])
    with pytest.raises(AssertionError):
        assert_equal(low(*(2 * t for t in arguments))[0], plain(*arguments)[0])
    low(*arguments)[0].square().sum().backward()
    assert_factors_learn(low, ("in_proj.left", "in_proj.right"))


def test_attention_rejects_wrong_factors():
    low, dense = attention(batch_first=True)
    arguments = inputs(True, cross=True)
    expected = dense(*arguments)[0]
    left, right = low.in_proj_left.detach(), low.in_proj_right.detach()
    swapped = left.unflatten(0, (3, EMBED))[[1, 0, 2]].flatten(0, 1)  # query and key change places
    for wrong in (Factors(swapped, right), Factors(left.flip(-1), right), Factors(left, right.flip(-1))):
        with pytest.raises(AssertionError):
            assert_equal(LowRankMultiheadAttention(dense, wrong).eval()(*arguments)[0], expected)
