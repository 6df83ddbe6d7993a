"""Hidden units in torch: layers that become smaller together compute what the same split computes in ONNX."""

import copy
import pickle

import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graph_passes as gp
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.planner import Filters
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.torch_models import module_units
from rsi_deploy.torch_models.calibration.activations import TorchActivations
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.fitted_compression import compress_fitted_
from rsi_deploy.torch_models.model_source import Source
from rsi_deploy.torch_models.module_units import find_module_units, keep_units_
from rsi_deploy.torch_models.to_onnx import to_onnx
from tests.nets import ResidualMLP, run_onnx, seeded

ROWS, TOKENS, IMAGES = (24,), (5, 24), (3, 8, 8)


class Gated(nn.Module):
    """The gated MLP of language models, beside a residual stream."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
        self.down_proj = nn.Linear(40, 24, bias=False)

    def forward(self, x):
        return x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Inverted(nn.Module):
    """Expand, depthwise and project, with a BatchNorm that no symbolic trace finds, and a slope for each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3)
        self.expand, self.norm = nn.Conv2d(10, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.act = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.PReLU(32)
        self.project = nn.Conv2d(32, 10, 1)

    def forward(self, x):
        if x.shape[1] != 3:  # data-dependent for torch.fx
            raise ValueError("expected images")
        x = self.stem(x)
        return x + self.project(self.act(self.depthwise(self.norm(self.expand(x)))))


class Pictures(nn.Module):
    """Convs in front of a Flatten: 9 inputs for each channel."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, bias=False)
        self.head = nn.Linear(12 * 4, 10)

    def forward(self, x):
        x = F.max_pool2d(self.two(F.relu(self.norm(self.one(x)))), 2)
        return self.head(torch.flatten(torch.tanh(x), 1))


def encoder():
    return nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)


CASES = {
    "mlp": (ResidualMLP, ROWS, {"down": (48, 1, ("up",))}),
    "gate": (Gated, TOKENS, {"down_proj": (40, 1, ("gate_proj", "up_proj"))}),
    "inverted": (Inverted, IMAGES, {"project": (32, 1, ("expand",))}),
    "pictures": (Pictures, IMAGES, {"two": (16, 1, ("one",)), "head": (12, 4, ("two",))}),
    "encoder": (encoder, TOKENS, {"linear2": (48, 1, ("linear1",))}),
}


def data(shape, count=256, seed=0):
    """Inputs near a few directions."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.Size(shape).numel()
    basis = torch.randn(10, flat, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, 10, generator=generator) @ basis / 3 + 0.1 * torch.randn(count, flat, generator=generator)
    return x.reshape(count, *shape)


def by_units(module, x, share, cost="keep_macs", **filters):
    """Compress within a budget by hidden units alone."""
    calibration = Calibration(solver=Solver(), forms=("units",))
    budget = Budget.parse(**{cost: share})
    records = compress_fitted_(module, [(x[:100],), (x[100:],)], budget, Filters(**filters), calibration, None)
    return {record.name: record for record in records}


def error(module, dense, x):
    with torch.no_grad():
        z, w = dense(x), module(x)
    return float((z - w).norm() / (z - z.mean(dim=0)).norm())


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("case", CASES)
def test_the_units_are_those_of_the_graph(case):
    make, shape, expected = CASES[case]
    module = seeded(make)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = find_module_units(module, (data(shape, 2),), {"depthwise": 7})
    assert {name: (u.units.count, u.units.run, tuple(sorted(u.units.makers))) for name, u in found.items()} == expected
    for each in found.values():
        held = sum(
            before[name].numel() for name in each.cuts if "running" not in name and name != f"{each.reader}.weight"
        )
        assert each.units.numbers == held / each.units.count
        made = sum(before[f"{name}.weight"].numel() for name in each.units.makers)
        assert each.units.beside == (held - made) / each.units.count
        assert each.macs == (7 if case == "inverted" else 0)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    if case == "inverted":
        assert {"norm.running_var", "act.weight", "depthwise.bias"} < found["project"].cuts.keys()
        assert (module.depthwise.groups, module.norm.num_features, module.expand.out_channels) == (32, 32, 32)


@pytest.mark.parametrize("case", CASES)
def test_fewer_units_compute_what_the_same_split_of_the_exported_model_computes(case, tmp_path):
    make, shape, expected = CASES[case]
    module, x = seeded(make), data(shape)
    # As `compress_` does, BatchNorms behind Convs are folded; the one of "inverted" is not found and stays.
    if case == "pictures":
        module.two.bias = nn.Parameter(torch.zeros(12))
    original = copy.deepcopy(module)
    reader = list(expected)[-1]
    units = find_module_units(module, (x[:2],))[reader]
    activations = TorchActivations(module, lambda: iter([(x,)]), units={reader: units})
    kept = units.units.count // 2 * units.units.run
    fit = Calibration(solver=Solver()).fit(activations, {reader: ("units", kept)})[reader]
    keep_units_(module, units, fit.replacement)
    exported = to_onnx(Source(name="net", module=original, example_inputs=(x[:2],)))
    form, left, right, bias = fit.replacement
    factors = gp.SplitFactors(left=left.numpy(), right=right.numpy(), form=form, bias=bias.reshape(-1).numpy())
    gp.split(
        exported.model,
        lambda site: factors if site.weight == f"{reader}.weight" else gp.Dense(reason="not this one"),
    )
    assert len(gp.FoldUnitsPass()(exported.model).folded) == 1
    onnx_ir.save(exported.model, tmp_path / "net.onnx")
    (answer,) = run_onnx(tmp_path / "net.onnx", {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(module(x), torch.from_numpy(answer), rtol=1e-4, atol=1e-4)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(original(x), torch.from_numpy(answer), rtol=1e-4, atol=1e-4)
    assert max(gp.count_parameters(exported.model), numbers(module)) < numbers(original)


@pytest.mark.parametrize(("case", "redundant"), [("gate", "unread"), ("inverted", "twins"), ("pictures", "twins")])
def test_units_that_say_nothing_new_go_without_a_loss(case, redundant):
    make, shape, expected = CASES[case]
    module, x = seeded(make), data(shape, 600)
    reader, (count, run, _) = list(expected.items())[-1]
    found = find_module_units(module, (x[:2],))[reader]
    half = torch.arange(count)
    half[1::2] -= 1  # every second unit is its neighbour
    weight = module.get_parameter(f"{reader}.weight")
    with torch.no_grad():
        for name, axis in found.cuts.items():
            if redundant == "twins" and name != f"{reader}.weight":
                tensor = module.state_dict()[name]
                tensor.copy_(tensor.index_select(axis.number, torch.from_numpy(axis.entries(half.numpy()))))
        if redundant == "unread":
            weight.reshape(len(weight), count, run, -1)[:, 1::2] = 0
    calibration = Calibration(solver=Solver(), ridge=1e-9, scarcity=0.0, cross_validate=False, use_gradients=False)
    activations = TorchActivations(module, lambda: iter([(x,)]), units={reader: found})
    test, losses = data(shape, 64, seed=5), []
    for kept in (count // 2, count // 2 - 2):
        fit = calibration.fit(activations, {reader: ("units", kept * run)})[reader]
        fewer = copy.deepcopy(module)
        keep_units_(fewer, found, fit.replacement)
        assert numbers(fewer) < numbers(module)
        losses.append(error(fewer, module, test))
    assert losses[0] < 2e-3
    assert losses[1] > 5e-3  # two less, and something is lost


@pytest.mark.parametrize(
    ("case", "cost"), [("mlp", "keep_macs"), ("inverted", "keep_params"), ("encoder", "keep_params")]
)
def test_a_budget_is_kept_by_smaller_layers_of_the_same_kind(case, cost):
    make, shape, expected = CASES[case]
    module, x = seeded(make), data(shape)
    dense, (reader, (count, run, makers)) = copy.deepcopy(module), list(expected.items())[-1]
    kinds = [type(layer) for layer in module.modules()]
    records = by_units(module, x, 0.8, cost)
    assert [type(layer) for layer in module.modules()] == kinds
    record = records[reader]
    kept = record.rank // run
    assert (record.form, record.outcome) == ("units", "split")
    assert 0 < kept < count
    assert record.params_compressed == module.get_parameter(f"{reader}.weight").numel()
    for maker in (*makers, *(["depthwise"] if case == "inverted" else [])):
        assert records[maker].outcome == "smaller"
        assert reader in records[maker].reason
        assert (
            records[maker].params_compressed
            == module.get_parameter(f"{maker}.weight").numel()
            < records[maker].params_dense
        )
    if cost == "keep_params":
        assert 0.6 * numbers(dense) < numbers(module) <= 0.8 * numbers(dense)
    assert 1e-4 < error(module, dense, data(shape, 64, seed=5)) < 0.7
    layer = module.get_submodule(makers[0])
    assert (layer.out_channels if case == "inverted" else layer.out_features) == kept
    assert list(module.get_submodule(reader).weight.shape)[1] == kept * run


@pytest.mark.parametrize("case", ["gate", "inverted", "encoder"])
def test_the_result_can_be_copied_pickled_trained_and_exported(case, tmp_path):
    make, shape, _ = CASES[case]
    module, x = seeded(make), data(shape)
    frozen = {name for name, _ in module.named_parameters() if name.endswith("bias")}
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    records = by_units(module, x, 0.8)
    assert "units" in {record.form for record in records.values()}
    with torch.no_grad():
        answer = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            torch.testing.assert_close(other(x), answer)
    exported = to_onnx(Source(name="net", module=module, example_inputs=(x[:2],)))
    onnx_ir.save(exported.model, tmp_path / "net.onnx")
    (found,) = run_onnx(tmp_path / "net.onnx", {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), answer, rtol=1e-4, atol=1e-4)
    assert frozen >= {name for name, p in module.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = module.train()(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


class Viewed(Pictures):
    """The number of inputs of the head is written into the code."""

    def forward(self, x):
        return self.head(F.max_pool2d(self.two(F.relu(self.norm(self.one(x)))), 2).view(-1, 48))


class Counted(ResidualMLP):
    """The outputs depend on how many units there are."""

    def forward(self, x):
        h = F.gelu(self.up(x))
        return self.head(x + self.down(h / h.shape[-1]))


class ReadTwice(ResidualMLP):
    """The hidden units are an output too."""

    def forward(self, x):
        h = F.gelu(self.up(x))
        return self.head(x + self.down(h)), h.sum()


class Tied(ResidualMLP):
    """A layer that this forward does not use shares the weight that makes the units."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(24, 48)
        self.other.weight = self.up.weight


class Stream(nn.Module):
    """What the reader reads is a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(24, 32), nn.Linear(32, 32), nn.Linear(32, 12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + torch.sin(self.block(x))))


class Branching(ResidualMLP):
    """torch.export cannot capture it."""

    def forward(self, x):
        return super().forward(x if float(x.sum()) > 1e9 else x + 0.0)


@pytest.mark.parametrize(
    ("make", "shape", "left", "share"),
    [
        (Viewed, IMAGES, {"two"}, 0.3),
        (Counted, ROWS, set(), 0.6),
        (ReadTwice, ROWS, set(), 0.6),
        (Tied, ROWS, set(), 0.6),
        (Stream, ROWS, set(), 0.6),
        (Branching, ROWS, set(), 0.6),
    ],
)
def test_units_that_cannot_go_are_left_alone_and_other_forms_compress(make, shape, left, share):
    module, x = seeded(make), data(shape)
    assert find_module_units(module, (x[:2],)).keys() == left
    records = compress_(module, calib=[(x,)], keep_params=share)
    assert not {record.name for record in records if record.form == "units"} - left
    assert {record.form for record in records} - {None, "units"}
    module(x)


@pytest.mark.parametrize(("make", "shape", "more"), [(Viewed, IMAGES, "head"), (Counted, ROWS, "down")])
def test_only_the_trial_shows_that_the_code_wants_all_units(make, shape, more, monkeypatch):
    module, x = seeded(make), data(shape, 2)
    known = find_module_units(module, (x,))
    monkeypatch.setattr(module_units, "_answers_alike", lambda *_: True)
    assert find_module_units(module, (x,)).keys() - known.keys() == {more}


@pytest.mark.parametrize(("exclude", "outcome"), [((), "smaller"), (("up",), "dense")])
def test_a_filter_on_what_makes_the_units_keeps_them(exclude, outcome):
    module = seeded(ResidualMLP)
    calibration = Calibration(solver=Solver(), forms=("units", "matmul"))
    budget = Budget.parse(keep_params=0.7)
    records = compress_fitted_(module, [(data(ROWS),)], budget, Filters(exclude=exclude), calibration, None)
    assert {record.name: record.outcome for record in records}["up"] == outcome
    assert (module.up.out_features == 48) == bool(exclude)
