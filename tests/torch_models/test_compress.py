import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from graph_passes.forms import unfold, unfolded_shape
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.linalg.solver import Solver, normalized_error
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.layers import (
    LowRankConv,
    LowRankLinear,
    LowRankMultiheadAttention,
    OpenMultiheadAttention,
)
from rsi_deploy.torch_models.module_sites import find_module_sites, replace_site_


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# -- models, each with an input


class Mlp(nn.Module):
    input_shape = (4, 12)

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(12, 32)
        self.fc2 = nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 6)

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Cnn(nn.Module):
    input_shape = (2, 3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, groups=2)
        self.norm2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16)
        self.norm3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3)
            norm.weight.data.normal_()

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.grouped(x)))
        return self.head(self.norm3(self.depthwise(x)).mean((-2, -1)))


class Attention(nn.Module):
    input_shape = (2, 5, 8)

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0] + x)


class Encoder(nn.Module):
    input_shape = (2, 5, 8)

    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x):
        return self.layers(x)


class Conv1dStack(nn.Sequential):
    input_shape = (2, 4, 9)

    def __init__(self):
        super().__init__(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, dilation=2))


class Conv3dStack(nn.Sequential):
    input_shape = (2, 2, 5, 5, 5)

    def __init__(self):
        super().__init__(nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 4, 2))


class Gpt2Block(nn.Module):
    input_shape = (2, 5, 8)

    def __init__(self):
        super().__init__()
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        self.c_fc, self.c_proj = conv1d(32, 8), conv1d(8, 32)
        for layer in (self.c_fc, self.c_proj):
            layer.weight.data.normal_()
            layer.bias.data.normal_()

    def forward(self, x):
        return self.c_proj(torch.tanh(self.c_fc(x)))


class TiedLinears(nn.Module):
    input_shape = (3, 12)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class SharedModule(nn.Module):
    """One layer under two names, which must become one low-rank layer."""

    input_shape = (3, 12)

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(12, 12)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


MODELS = [Mlp, Cnn, Attention, Encoder, Conv1dStack, Conv3dStack, Gpt2Block, TiedLinears, SharedModule]
WEIGHTS = {
    Mlp: {"fc1", "fc2", "head"},
    Cnn: {"stem", "grouped", "depthwise", "head"},
    Attention: {"attn.in_proj_weight", "attn.out_proj", "head"},
    Encoder: {
        f"layers.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    },
    Conv1dStack: {"0", "3"},
    Conv3dStack: {"0", "2"},
    Gpt2Block: {"c_fc", "c_proj"},
    TiedLinears: {"a"},
    SharedModule: {"a"},
}


def example(model):
    return torch.randn(*model.input_shape, dtype=next(model.parameters()).dtype)


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_different(found, expected):
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def parameter_count(model):
    return sum(p.numel() for p in model.parameters())


def factor_layers(model):
    kinds = (LowRankLinear, LowRankConv, OpenMultiheadAttention)
    return {path: m for path, m in model.named_modules() if isinstance(m, kinds)}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


# -- full rank first: nothing may change


@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("kind", MODELS)
def test_full_rank_keeps_the_outputs(kind, method):
    model = kind().double().eval()
    x = example(model)
    expected = outputs(model, x)
    records = compress_(model, "100%", always_split=True, method=method)
    assert {record.name for record in records} == WEIGHTS[kind]
    assert all(record.decision == "split" for record in records)
    if method != "rsvd":  # rsvd loses digits if the sketch is ill-conditioned
        assert all(record.normalized_error == 1.0 for record in records)
    assert_equal(outputs(model, x), expected)
    assert_equal(model(x), expected)  # with gradients on, where torch takes no fast path
    for layer in factor_layers(model).values():
        first = next(iter(layer.parameters()))
        first.data = first.data.roll(1, 0)
        break
    assert_different(outputs(model, x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_low_rank_changes_the_outputs_and_saves_parameters(kind):
    model = kind().double().eval()
    x = example(model)
    dense, before = outputs(model, x), parameter_count(model)
    records = compress_(model, 1)
    assert_different(outputs(model, x), dense)
    saved = sum(record.params_dense - record.params_compressed for record in records)
    assert saved > 0
    # A folded BatchNorm removes its two vectors and adds a bias to its Conv.
    folded = sum(2 * 16 for name in ("norm1", "norm2", "norm3") if isinstance(getattr(model, name, None), nn.Identity))
    biases = 16 if kind is Cnn else 0
    if kind is Conv1dStack:
        folded, biases = 16, 0
    assert parameter_count(model) == before - saved - folded + biases


# -- replacing one site


def replacement(site, form, dtype=torch.float64, *, scale=1.0):
    rows, columns = unfolded_shape(site.shape[0], site.shape[1] // math.prod(site.kernel), site.kernel, form)
    return Replacement(
        form,
        torch.randn(site.groups, rows, 2, dtype=dtype),
        torch.randn(site.groups, 2, columns, dtype=dtype),
        scale * torch.randn(site.groups, site.shape[0], dtype=dtype),
    )


def folded(weight, form, site):
    """`(groups, rows, columns)` in a form back to the weight's own shape."""
    if not site.kernel:
        return weight[0].T if site.kind == "Conv1D" else weight[0]
    shape = site.groups, site.shape[0], site.parameter.shape[1], *site.kernel
    places = unfold(np.arange(math.prod(shape)).reshape(shape), form)
    flat = torch.empty(math.prod(shape), dtype=weight.dtype)
    flat[torch.from_numpy(places.reshape(-1).copy())] = weight.reshape(-1)
    return flat.reshape(site.parameter.shape)


@pytest.mark.parametrize("kind", MODELS)
def test_a_replaced_site_equals_a_dense_layer_with_its_weight_and_bias(kind):
    model = kind().double().eval()
    x = example(model)
    for site in find_module_sites(model):
        for form in site.forms:
            low, dense = copy.deepcopy(model), copy.deepcopy(model)
            (place,) = (s for s in find_module_sites(low) if s.name == site.name)
            wanted = replacement(site, form)
            replace_site_(low, place, wanted)
            low_layers = [low.get_submodule(path) for path in site.paths]
            changed = set()
            for path, layer in zip(site.paths, low_layers, strict=True):
                other, key = dense.get_submodule(path), site.weight.rpartition(".")[2]
                assert layer in factor_layers(low).values()
                assert layer.left is low_layers[0].left if hasattr(layer, "left") else True
                if id(other) in changed:  # one layer under two names
                    assert layer is low_layers[0]
                    continue
                changed.add(id(other))
                other._parameters[key].data = folded(wanted.left @ wanted.right, form, site).clone()
                name = key.replace("weight", "bias")
                own = other._parameters[name]
                bias = wanted.bias.reshape(-1)
                other._parameters[name] = nn.Parameter(bias if own is None else own.detach() + bias)
            assert_equal(outputs(low, x), outputs(dense, x))
            assert_different(outputs(low, x), outputs(model, x))
            wrong = copy.deepcopy(model)
            (place,) = (s for s in find_module_sites(wrong) if s.name == site.name)
            replace_site_(wrong, place, wanted._replace(bias=2 * wanted.bias))
            assert_different(outputs(wrong, x), outputs(dense, x))


def test_a_replacement_without_a_bias_leaves_it_alone():
    model = Mlp()
    bias = model.fc1.bias
    for site in find_module_sites(model)[:2]:
        replace_site_(model, site, replacement(site, "matmul", torch.float32, scale=0.0))
    assert model.fc1.bias is bias
    assert model.fc2.bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_replacement_is_stored_balanced_in_the_weights_dtype(dtype):
    model = Mlp().to(dtype)
    (site, *_) = find_module_sites(model)
    wanted = replacement(site, "matmul", torch.float32)
    wide = wanted._replace(left=wanted.left * 1e-4, right=wanted.right * 1e5)  # which float16 cannot hold
    replace_site_(model, site, wide)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = 10 * wanted.left[0] @ wanted.right[0]
    assert (model.fc1.left.float() @ model.fc1.right.float() - expected).norm() < 0.02 * expected.norm()
    assert (2 * model.fc1.left.float() @ model.fc1.right.float() - expected).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pivoted_factors_of_few_bits_have_small_entries_and_keep_the_product(dtype):
    model = Mlp().to(dtype)
    (site, *_) = find_module_sites(model)
    wanted = replacement(site, "pivoted", torch.float32)
    wanted.left[0, :2] *= 1e-2  # as pivots, these rows would leave large entries for the others
    replace_site_(model, site, wanted)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert float(model.fc1.left.detach().abs().max()) <= 2
    expected, found = wanted.left[0] @ wanted.right[0], model.fc1.weight.detach().float()
    tolerance = 4 * torch.finfo(dtype).eps
    assert (found - expected).norm() < tolerance * expected.norm()
    assert (found.roll(1, 0) - expected).norm() > tolerance * expected.norm()


@pytest.mark.parametrize("gradients", [True, False])
def test_frozen_pivoted_factors_stay_frozen(gradients):
    model = Attention().requires_grad_(gradients)
    for site in find_module_sites(model):
        replace_site_(model, site, replacement(site, "pivoted", torch.float32))
    assert {p.requires_grad for p in model.parameters()} == {gradients}
    assert find_module_sites(model) == []


def test_a_frozen_site_stays_frozen_and_the_root_is_refused():
    model = Mlp()
    model.fc1.requires_grad_(False)
    (site, *_) = find_module_sites(model)
    replace_site_(model, site, replacement(site, "matmul", torch.float32))
    assert [p.requires_grad for p in model.fc1.parameters()] == [False] * 3
    root = nn.Linear(4, 4)
    (site,) = find_module_sites(root)
    with pytest.raises(UsageError, match="itself a Linear"):
        replace_site_(root, site, replacement(site, "matmul", torch.float32))


def test_one_container_under_two_names():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 6))})
    model["b"] = model["a"]
    (site,) = find_module_sites(model)
    replace_site_(model, site, replacement(site, "matmul", torch.float32))
    assert isinstance(model["b"][0], LowRankLinear)
    assert model["a"][0] is model["b"][0]


# -- what each weight becomes


@pytest.mark.parametrize("kind", [Mlp, Gpt2Block, Attention])
def test_every_weight_has_the_factors_of_the_solver_for_its_name(kind):
    model = kind().double().eval()
    dense = {site.name: site.matrix() for site in find_module_sites(model)}
    records = compress_(model, 2, seed=7, always_split=True)
    for record in records:
        path = record.name.removesuffix(".in_proj_weight")
        layer = model.get_submodule(path)
        found = layer.in_proj_weight if isinstance(layer, LowRankMultiheadAttention) else layer.weight
        factors = Solver(seed=7)(dense[record.name][0], 2, site=record.name)
        assert_equal(found, factors.left @ factors.right)
        assert normalized_error(dense[record.name][0], factors) == pytest.approx(record.normalized_error, rel=0.02)
        other = Solver(seed=7)(dense[record.name][0], 2, site="another")
        assert not torch.equal(other.left @ other.right, found)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_exact_method_is_the_optimum_of_the_folded_weight(rank):
    model = Cnn().double().eval()
    conv, norm = model.stem, model.norm1
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = (conv.weight * scale[:, None, None, None]).flatten(1)
    optimum = torch.linalg.svdvals(folded)[rank:].norm()
    compress_(model, rank, method="svd", include=["stem"])
    assert isinstance(model.norm1, nn.Identity)
    assert isinstance(model.norm2, nn.BatchNorm2d)
    torch.testing.assert_close((folded - model.stem.weight.flatten(1)).norm(), optimum, rtol=1e-9, atol=0)
    assert (conv.weight.flatten(1) - model.stem.weight.flatten(1)).norm() < 1.001 * optimum  # folded in place
    assert (folded - 2 * model.stem.weight.flatten(1)).norm() > 1.1 * optimum


def test_a_model_in_training_keeps_its_batch_norms():
    model = Cnn().double().train()
    compress_(model, "100%", always_split=True)
    assert [isinstance(m, nn.BatchNorm2d) for m in (model.norm1, model.norm2, model.norm3)] == [True] * 3
    assert all(layer.training for layer in factor_layers(model).values())


def test_a_batch_norm_left_in_training_is_kept():
    model = Cnn().double().eval()
    model.norm1.train()
    compress_(model, "100%", always_split=True)
    assert isinstance(model.norm1, nn.BatchNorm2d)
    assert isinstance(model.norm2, nn.Identity)


def test_a_conv_that_stays_dense_keeps_its_batch_norm():
    model = Cnn().eval()
    before = model.stem.weight.clone()
    compress_(model, "100%", always_split=True, exclude=["stem"])
    assert torch.equal(model.stem.weight, before)
    assert isinstance(model.norm1, nn.BatchNorm2d)


@pytest.mark.parametrize("kind", [TiedLinears, SharedModule])
def test_tied_layers_stay_tied(kind):
    model = kind()
    (record,) = compress_(model, 3)
    assert record.nodes == ("a", "b")
    assert isinstance(model.a, LowRankLinear)
    assert isinstance(model.b, LowRankLinear)
    assert model.a.left is model.b.left
    assert model.a.right is model.b.right
    assert (model.a.bias is model.b.bias) == (kind is SharedModule)


def test_a_linear_tied_to_an_embedding_stays_dense_with_a_reason():
    model = TiedToEmbedding()
    records = {record.name: record for record in compress_(model, 2)}
    assert set(records) == {"embedding", "body"}
    tied = records["embedding"]
    assert tied.decision == "dense"
    assert "tied to embedding.weight" in tied.reason
    assert tied.nodes == ("embedding", "head")
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.body, LowRankLinear)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Renamed(nn.Linear):
    """A subclass that changes nothing about the mathematics."""


def test_custom_forwards_stay_dense_with_the_reason_and_mere_subclasses_do_not():
    model = nn.Sequential(Scaled(8, 8), Standardized(8, 8, 3), Renamed(8, 8))
    scaled, standardized, renamed = compress_(model, 2)
    assert (scaled.decision, scaled.reason) == ("dense", "Scaled has a forward of its own")
    assert (standardized.decision, standardized.reason) == ("dense", "Standardized has a forward of its own")
    assert renamed.decision == "split"
    assert [type(layer) for layer in model] == [Scaled, Standardized, LowRankLinear]


def test_layers_that_are_never_split_have_a_reason():
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(4, 8, 3),
            "lstm": nn.LSTM(6, 5, num_layers=2),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "biased": nn.MultiheadAttention(8, 2, add_bias_kv=True),
            "zeros": nn.MultiheadAttention(8, 2, add_zero_attn=True),
            "fc": nn.Linear(8, 8),
        }
    )
    records = {r.name: r for r in compress_(model, 1)}
    assert "ConvTranspose" in records["up"].reason
    assert {name for name in records if "lstm" in name} == {f"lstm.weight_{k}h_l{n}" for k in "ih" for n in (0, 1)}
    assert all("recurrent" in r.reason for name, r in records.items() if "lstm" in name)
    for name in ("cross.q_proj_weight", "cross.k_proj_weight", "biased.in_proj_weight", "zeros.in_proj_weight"):
        assert records[name].decision == "dense"
        assert "is not split in PyTorch" in records[name].reason
    assert records["fc"].decision == "split"
    assert isinstance(model["biased"], nn.MultiheadAttention)


def test_an_output_projection_alone():
    """A dense attention reads the `.weight` of a low-rank `out_proj`, which is correct but not faster."""
    model = Attention().double().eval()
    x = example(model)
    expected = outputs(model, x)
    compress_(model, "100%", always_split=True, include=["attn.out_proj"])
    assert isinstance(model.attn, nn.MultiheadAttention)
    assert_equal(outputs(model, x), expected)


@pytest.mark.parametrize("include", [["*"], ["*linear*"], ["*out_proj"]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fused_encoder_is_not_taken_around_low_rank_layers(padded, include):
    """The fused path would read `.weight`, which is slower than the dense layer, and nest tensors with padding."""
    model = Encoder().eval()
    compress_(model, 1, include=include, always_split=True)
    x = example(model)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    if padded:
        padding[1, 3:] = True
    expected = model.layers(x, src_key_padding_mask=padding)
    calls = []
    for layer in factor_layers(model).values():
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    with torch.no_grad():
        found = model.layers(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    if include != ["*out_proj"]:  # the dense attention reads its weight
        assert set(map(id, calls)) == set(map(id, factor_layers(model).values()))


# -- a module that is itself the layer


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.MultiheadAttention(8, 2)], ids=repr)
def test_a_bare_layer_cannot_be_replaced_in_place(layer):
    before = state(layer)
    with pytest.raises(UsageError, match=r"itself a \w+, which cannot be replaced in place: pass nn.Sequential"):
        compress_(layer, 2)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_a_bare_layer_that_stays_dense_is_no_error():
    (record,) = compress_(nn.Linear(8, 8), 6)
    assert (record.name, record.decision) == ("weight", "dense")


# -- decisions, filters, records


def test_a_site_that_saves_nothing_stays_dense():
    model = Mlp()
    records = {r.name: r for r in compress_(model, 8)}
    assert [records[name].decision for name in ("fc1", "fc2", "head")] == ["split", "split", "dense"]
    assert records["head"].reason == "rank 8 saves nothing: break-even is 5.1"
    assert isinstance(model.head, nn.Linear)


def test_filters_do_not_change_the_factors_of_other_sites():
    whole, part = Mlp(), Mlp()
    part.load_state_dict(whole.state_dict())
    compress_(whole, 3)
    records = {r.name: r for r in compress_(part, 3, include=["fc*"], exclude=["fc1"])}
    assert records["fc1"].reason == "excluded by --exclude fc1"
    assert records["head"].reason == "not matched by --include"
    assert isinstance(part.fc1, nn.Linear)
    assert torch.equal(part.fc2.left, whole.fc2.left)
    assert torch.equal(part.fc2.right, whole.fc2.right)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "0.4"}, "--rank 40%"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 33}, "above the full rank of every site"),
        ({"rank": 3, "include": ["layer*"]}, "--include 'layer"),
        ({"rank": 3, "exclude": ["fc9"]}, "--exclude 'fc9' matches none"),
    ],
)
def test_invalid_requests_change_nothing(options, message):
    model = Mlp()
    before = state(model)
    with pytest.raises(UsageError, match=message):
        compress_(model, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = Mlp()
    model.fc2.weight.data[3, 3] = value
    with pytest.raises(ModelError, match=r"site 'fc2'.*--exclude 'fc2'"):
        compress_(model, 3)
    compress_(model := Mlp(), 3, exclude=["fc2"])
    assert isinstance(model.fc1, LowRankLinear)


def test_records_are_complete_and_in_the_trees_order():
    model = Cnn().eval()
    seen = []
    records = compress_(model, 2, progress=lambda name, index, count: seen.append((name, index, count)))
    assert [r.name for r in records] == ["stem", "grouped", "depthwise", "head"]
    assert [r.kind for r in records] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    assert [(r.groups, r.out_features, r.in_features) for r in records] == [
        (1, 16, 27),
        (2, 8, 72),
        (16, 1, 9),
        (1, 10, 16),
    ]
    assert [r.decision for r in records] == ["split", "split", "dense", "split"]
    assert seen == [("stem", 0, 4), ("grouped", 1, 4), ("head", 3, 4)]
    for record in records:
        assert record.nodes == (record.name,)
        assert record.reason
        if record.decision == "split":
            assert 0 < record.frobenius_error < 1
            assert 0 < record.spectral_error < 1
            assert 1 <= record.normalized_error < 3
            assert record.seconds > 0
            assert record.params_compressed == record.groups * 2 * (record.out_features + record.in_features)


def test_a_model_without_sites():
    assert compress_(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), 3) == []


def test_an_empty_layer_is_dense():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(4, 0), nn.Linear(8, 8))
    assert [r.decision for r in compress_(model, 2)] == ["dense", "split"]


@pytest.mark.parametrize("kind", [Mlp, Cnn, Encoder, TiedLinears])
def test_a_second_run_finds_nothing_more_to_split(kind):
    model = kind().eval()
    compress_(model, 1, always_split=True)
    before = state(model)
    assert compress_(model, 1, always_split=True) == []
    assert state(model).keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- determinism


def test_the_seed_decides_and_the_global_one_does_not():
    models = [Mlp() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.rand(7)  # moves the global stream
        compress_(model, 2, seed=seed)
    same, again, other = (model.fc1.left for model in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


# -- the result is an ordinary module


@pytest.mark.parametrize("kind", [Mlp, Cnn, Encoder, Gpt2Block])
def test_one_step_of_training_moves_every_factor(kind):
    model = kind().double().eval()
    compress_(model, 1, always_split=True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = state(model)
    (model(example(model)) ** 2 * torch.randn(1, dtype=torch.float64)).sum().backward()
    optimizer.step()
    for path, layer in factor_layers(model).items():
        for key in layer._parameters:
            if "left" in key or "right" in key:
                assert not torch.equal(layer.get_parameter(key), before[f"{path}.{key}"]), (path, key)


@pytest.mark.parametrize("kind", [Mlp, Cnn, Attention])
@pytest.mark.parametrize("gradients", [True, False])
def test_frozen_layers_stay_frozen_and_others_do_not(kind, gradients):
    model = kind().eval().requires_grad_(gradients)
    with torch.no_grad():
        compress_(model, 1, always_split=True)
    assert {p.requires_grad for p in model.parameters()} == {gradients}


@pytest.mark.parametrize("kind", [Mlp, Cnn, Attention, TiedLinears])
def test_state_dict_round_trip(kind):
    model, other = kind().eval(), kind().eval()
    x = example(model)
    compress_(model, 2, always_split=True)
    compress_(other, 2, always_split=True, seed=9)
    assert not torch.equal(outputs(other, x), outputs(model, x))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(outputs(other, x), outputs(model, x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Mlp, Cnn, Attention, Conv3dStack, TiedLinears])
def test_copies(kind, copied):
    model = kind().eval()
    compress_(model, 2, always_split=True)
    x = example(model)
    other = copied(model)
    assert torch.equal(outputs(other, x), outputs(model, x))
    next(other.parameters()).data.zero_()
    assert not torch.equal(outputs(other, x), outputs(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype):
    model = Mlp().to(dtype).eval()
    x = example(model)
    dense = outputs(model, x)
    compress_(model, "100%", always_split=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(outputs(model, x), dense, rtol=tolerance, atol=tolerance)


def test_exporting_and_scripting_tools_still_trace_it():
    model = Cnn().eval()
    compress_(model, 2)
    x = example(model)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_a_weight_of_nan_is_named_with_what_leaves_it_dense():
    module = Mlp()
    module.fc2.weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"'fc2'.*NaN.* \(exclude 'fc2' to leave it dense\)"):
        compress_(module, max_error="50%")
    records = compress_(module, max_error="50%", exclude=["fc2"])
    assert {record.name: record.decision for record in records}["fc2"] == "dense"
