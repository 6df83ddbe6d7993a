"""Options and fits of `Calibration` against brute force on small models and simulated activations."""

import math

import numpy as np
import onnx
import pytest
import torch

from rsi_deploy.calibration.activations import CalibratedSite, Distance, OutputSensitivity
from rsi_deploy.calibration.moments import MomentAccumulator
from rsi_deploy.calibration.reduced_rank_regression import dense_response_error, response_error, sensitivity_root
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import break_even_rank
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.planning import site_options as calibrated
from rsi_deploy.planning.losses import FARTHEST, PowerLaw
from rsi_deploy.planning.site_fits import CONSTANT
from rsi_deploy.planning.site_options import LEVELS, Calibration
from rsi_deploy.precision.lowering import Lowering, lower
from rsi_deploy.precision.schemes import FEW_BITS
from tests import flows

SOLVER = Solver(power_iterations=6)

NET = """agraph (float[n, 4, 10, 10] x) => (float[n, 6] y)
<float[12, 4, 3, 3] c1, float[12] c1_bias, float[12, 12, 3, 3] c2, float[12, 12] fc, float[12, 6] head> {
  h1 = Conv <pads = [1, 1, 1, 1]> (x, c1, c1_bias)
  r1 = Relu(h1)
  h2 = Conv <strides = [2, 2]> (r1, c2)
  r2 = Relu(h2)
  m = GlobalAveragePool(r2)
  f = Flatten(m)
  k = MatMul(f, fc)
  r3 = Relu(k)
  y = MatMul(r3, head)
}"""


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net:
    def __init__(self, folder, samples=48):
        self.path = flows.saved(flows.text_model(NET), folder / "dense.onnx")
        x = np.random.default_rng(0).standard_normal((samples, 4, 10, 10)).astype(np.float32)
        x += np.roll(x, 1, axis=2) + np.roll(x, 1, axis=3)
        self.batches = [{"x": part} for part in np.split(x, 3)]
        self.samples = samples
        self.x = x

    def activations(self, **options):
        return OnnxStreams(self.path, lambda: iter(self.batches), self.samples, **options)

    def change_(self, name, function):
        model = onnx.load(self.path)
        (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        weight.CopyFrom(onnx.numpy_helper.from_array(function(onnx.numpy_helper.to_array(weight)), name))
        onnx.save(model, self.path)


@pytest.fixture
def net(tmp_path):
    return Net(tmp_path)


class OneSite:
    """Activations of one site with fixed rows; `law` maps its response error to the distance of the outputs."""

    def __init__(self, x, weight, *, y=None, limit=10**6, law=lambda error: Distance(error, None), **described):
        gathering = MomentAccumulator(x.shape[-1], limit=limit)
        gathering.add(x, x @ weight.mT if y is None else y)
        self.moments = gathering.result()
        groups, out, into = weight.shape
        self.site = CalibratedSite(
            name="one",
            kind="Linear",
            groups=groups,
            out_features=out,
            in_features=into,
            load=lambda: weight,
            **{"forms": ("matmul",), **described},
        )
        self.sites, self.unreachable, self.law, self.asked = (self.site,), {}, law, []

    def survey(self, visit):
        visit(self.site, self.moments)

    def sequence(self, visit, counts=None):
        visit(self.site, self.moments)

    def distance(self, replacements):
        (replacement,) = replacements.values()
        self.asked.append(self.error(replacement))
        return self.law(self.asked[-1])

    def error(self, replacement):
        return response_error(replacement.left @ replacement.right, self.moments)

    def sensitivities(self):
        return {}


def fading(rows=400, into=12, seed=0):
    return randn(1, rows, into, seed=seed) * 0.8 ** torch.arange(into) + 2


# -- options


def test_options_are_every_rank_that_saves_something(net):
    options = {site.name: site.options for site in Calibration(solver=SOLVER).options(net.activations())}
    assert list(options) == ["c1", "c2", "fc", "head"]
    for site in net.activations().sites:
        dense, *split = options[site.name]
        assert (dense.form, dense.rank, dense.loss) == ("dense", None, 0)
        assert dense.params == site.load().numel()
        assert dense.bytes == 4 * dense.params
        for option in split:
            assert site.split_params(option.form, option.rank) < dense.params
            assert option.params == site.split_params(option.form, option.rank) + site.groups * site.out_features
            assert 0 <= option.loss < math.inf
        usual = [option.rank for option in split if option.form == site.forms[0]]
        assert usual == list(range(1, math.ceil(break_even_rank(*site.shape(site.forms[0])))))
        if "pivoted" in site.forms:
            pivoted = [option.rank for option in split if option.form == "pivoted"]
            assert pivoted == list(range(1, len(pivoted) + 1))
            assert len(pivoted) < min(site.shape("pivoted"))
        assert {option.form for option in split} | {"pivoted"} == {*site.forms, "pivoted"}


def test_losses_fall_with_the_rank(net):
    for site in Calibration(solver=SOLVER, measure_losses=False).options(net.activations()):
        for form in {option.form for option in site.options[1:]}:
            losses = [option.loss for option in site.options if option.form == form]
            assert losses == sorted(losses, reverse=True)
            assert losses[0] > losses[-1] or len(losses) == 1


def test_ranks_and_forms_can_be_restricted(net):
    calibration = Calibration(solver=SOLVER, min_rank=3, rank_multiple=2, forms=("channel", "matmul"))
    options = [option for site in calibration.options(net.activations()) for option in site.options if option.rank]
    assert {option.form for option in options} == {"channel", "matmul"}
    assert {option.rank % 2 for option in options} == {0}
    assert min(option.rank for option in options) == 4


def test_a_plan_may_take_every_rank_of_every_form(net, monkeypatch):
    monkeypatch.setattr(calibrated, "GRID_POINTS", 3)
    for site in Calibration(solver=SOLVER, measure_losses=False).options(net.activations()):
        for form in {option.form for option in site.options[1:]}:
            own = [option for option in site.options if option.form == form]
            assert [option.rank for option in own] == list(range(1, len(own) + 1))
            losses = [option.loss for option in own]
            assert losses == sorted(losses, reverse=True)
            assert len(set(losses)) == len(losses) or losses[-1] == 0


def test_losses_are_weighted_by_the_output_sensitivity():
    weight, x = randn(1, 20, 12, seed=1), fading()
    plain = OneSite(x, weight)
    heard = OneSite(x, weight)
    G = torch.zeros(1, 20, 20)
    G[0, 0, 0] = 1.0  # the output depends on the first feature of the response
    heard.sensitivities = lambda: {"one": OutputSensitivity(directions=G, rows=None)}
    calibration = Calibration(solver=SOLVER, measure_losses=False, ridge=1e-9)
    ((blind,), (listening,)) = calibration.options(plain), calibration.options(heard)
    for one, other in zip(blind.options[1:4], listening.options[1:4], strict=True):
        replacement = calibration.replacement(heard.site, heard.moments, other.form, other.rank, sensitivity=G)
        lost = dense_response_error(weight, replacement.left @ replacement.right, heard.moments, G)
        assert other.loss == pytest.approx(lost**2, rel=1e-2)
        assert other.loss < 0.9 * one.loss


def test_of_a_language_model_the_loss_is_the_divergence_without_a_run():
    weight, x = randn(1, 20, 12, seed=1), fading()
    activations = OneSite(x, weight)
    root = randn(20, 20, seed=4)
    G = (root @ root.mT)[None]
    activations.sensitivities = lambda: {"one": OutputSensitivity(directions=G, rows=None, in_nats=True)}
    calibration = Calibration(solver=SOLVER, ridge=1e-9)
    (site,) = calibration.options(activations)
    assert activations.asked == []
    for option in site.options[1:6]:
        made = calibration.replacement(activations.site, activations.moments, option.form, option.rank, sensitivity=G)
        lost = (weight - made.left @ made.right)[0].double()
        damped = sensitivity_root(G)[0] @ sensitivity_root(G)[0].mT * G[0].diagonal().double().mean()
        divergence = float((damped @ lost @ activations.moments.xx[0].double() * lost).sum()) / 2
        assert option.loss == pytest.approx(divergence, rel=0.01)
        assert option.loss != pytest.approx(option.error, rel=0.15)


def test_without_measured_losses_the_loss_is_the_squared_error():
    activations = OneSite(fading(), randn(1, 20, 12, seed=1))
    calibration = Calibration(solver=SOLVER, measure_losses=False, ridge=1e-9)
    (site,) = calibration.options(activations)
    for option in site.options[1:]:
        error = activations.error(
            calibration.replacement(activations.site, activations.moments, option.form, option.rank)
        )
        assert option.loss == pytest.approx(error**2, rel=1e-3, abs=1e-12)
    assert activations.asked == []


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_loss_is_the_measured_distance(power):
    activations = OneSite(fading(), randn(1, 20, 12, seed=1), law=lambda error: Distance(3 * error**power, None))
    calibration = Calibration(solver=SOLVER, ridge=1e-9)
    (site,) = calibration.options(activations)
    assert 1 <= len(activations.asked) <= len(LEVELS)
    inside = [
        (option, error)
        for option in site.options[1:]
        if min(activations.asked)
        <= (
            error := activations.error(
                calibration.replacement(activations.site, activations.moments, option.form, option.rank)
            )
        )
        <= max(activations.asked)
    ]
    assert inside
    for option, error in inside:
        assert option.loss == pytest.approx(3 * error**power, rel=1e-2)
        assert option.loss != pytest.approx(error**power, rel=1e-1)


@pytest.mark.parametrize("distance", [Distance(math.inf, math.inf), Distance(0.0, 0.0), Distance(1e300, None)])
def test_losses_are_finite_for_any_distance(distance):
    (site,) = Calibration(solver=SOLVER).options(OneSite(fading(), randn(1, 20, 12), law=lambda error: distance))
    assert all(0 <= option.loss < math.inf for option in site.options)


def test_progress_is_reported(net):
    calls = []
    calibration = Calibration(solver=SOLVER, measure_losses=False)
    calibration.options(net.activations(), lambda *step: calls.append(step))
    assert calls == [("c1", 0, 4), ("c2", 1, 4), ("fc", 2, 4), ("head", 3, 4)]
    calls.clear()
    calibration.fit(net.activations(), {"fc": ("matmul", 2), "c2": ("input", 1)}, lambda *step: calls.append(step))
    assert calls == [("c2", 0, 2), ("fc", 1, 2)]


# -- fit


@pytest.mark.parametrize("form", ["channel", "input", "separable"])
def test_fitted_sites_have_the_reported_error(net, tmp_path, form):
    plan = {"c1": (form, 3), "c2": (form, 4), "fc": ("matmul", 3)}
    activations = net.activations(
        macs={site.node: 1000 for site in flows.graph_sites(net.path).values()}, compensate=False
    )
    fitted = Calibration(solver=SOLVER, use_gradients=False).fit(
        activations, plan
    )  # gradients would change the row weights
    assert list(fitted) == ["c1", "c2", "fc"]
    sites, done = flows.graph_sites(net.path), {}
    dense = flows.all_values(net.path, {"x": net.x})
    for name, found in fitted.items():
        assert (found.replacement.form, found.replacement.left.shape[-1]) == plan[name]
        done[name] = found.replacement
        other = flows.all_values(flows.really_split(net.path, tmp_path / "split.onnx", done), {"x": net.x})
        y, z = (flows.output_rows(sites[name], values[sites[name].output]).double() for values in (dense, other))
        spread = (y - y.mean(1, keepdim=True)).square().sum()
        assert found.response_error == pytest.approx(float((y - z).square().sum() / spread), rel=1e-3)
        assert abs(float((y - z).mean(1).abs().max())) < 1e-4 * float(y.abs().max())  # the bias removes the mean error
        assert found.macs == (1000, {s.name: s for s in activations.sites}[name].split_macs(*plan[name]))
        assert found.seconds > 0
    assert fitted["fc"].response_error > 1e-6


@pytest.mark.parametrize("bits", [5, 4, 3])
@pytest.mark.parametrize("form", ["channel", "input", "separable"])
def test_lowering_stores_the_numbers_that_were_fitted(net, tmp_path, form, bits):
    plan, x = {"c1": (form, 3), "c2": (form, 4), "fc": ("matmul", 3)}, {"x": net.x}
    fitted = Calibration(solver=SOLVER).fit(net.activations(), plan, None, dict.fromkeys(plan, bits))
    unrounded = Calibration(solver=SOLVER).fit(net.activations(), plan)
    moved = []
    for number, fits in enumerate((fitted, unrounded)):
        done = {name: fit.replacement for name, fit in fits.items()}
        split = flows.really_split(net.path, tmp_path / f"split{number}.onnx", done)
        target = tmp_path / f"lowered{number}.onnx"
        sites = {**dict.fromkeys(plan, bits), "head": 32}
        nodes = {site.node: sites[name] for name, site in flows.graph_sites(net.path).items()}
        stored = lower(split, target, Lowering(scheme=FEW_BITS, bits=nodes), None)
        assert set(stored.values()) == {bits}
        assert len(stored) == 6
        expected, found = flows.outputs(split, x)[0], flows.outputs(target, x)[0]
        moved.append(np.abs(found - expected).max() / np.abs(expected).max())
    assert moved[0] < 1e-4 < moved[1]


def test_fitting_in_sequence_beats_fitting_alone(net, tmp_path):
    plan = {"c1": ("channel", 2), "c2": ("channel", 4), "fc": ("matmul", 3)}
    calibration = Calibration(solver=SOLVER)
    sequence = {name: fit.replacement for name, fit in calibration.fit(net.activations(), plan).items()}
    alone = {name: calibration.fit(net.activations(), {name: plan[name]})[name].replacement for name in plan}
    plain = {}
    for site in net.activations().sites:
        if site.name in plan:
            left, right = Solver(method="svd")(site.load(), plan[site.name][1])
            plain[site.name] = sequence[site.name]._replace(left=left, right=right, bias=0 * sequence[site.name].bias)
    moved = [net.activations().distance(replacements).relative for replacements in (sequence, alone, plain)]
    assert moved[0] < moved[1] < moved[2]


def test_full_rank_is_the_dense_model(net):
    plan = {site.name: (site.forms[-1], min(site.shape(site.forms[-1]))) for site in net.activations().sites}
    fitted = Calibration(solver=SOLVER).fit(net.activations(), plan)
    assert net.activations().distance({name: fit.replacement for name, fit in fitted.items()}).relative < 1e-6
    low = Calibration(solver=SOLVER).fit(net.activations(), {**plan, "fc": ("matmul", 1)})
    assert net.activations().distance({name: fit.replacement for name, fit in low.items()}).relative > 1e-4


def test_an_empty_plan_fits_nothing(net):
    assert Calibration(solver=SOLVER).fit(net.activations(), {}) == {}


def test_an_input_too_wide_for_a_form_is_refused():
    x = randn(1, 30, 36)
    described = {"kernel": (3, 3), "strides": (1, 1), "forms": ("channel", "input", "separable")}
    activations = OneSite(x, randn(1, 8, 36), limit=20, **described)
    calibration = Calibration(solver=SOLVER, measure_losses=False)
    with pytest.raises(ModelError, match=r"site 'one': form 'input'.*plan it as 'channel'"):
        calibration.fit(activations, {"one": ("input", 2)})
    assert calibration.fit(activations, {"one": ("channel", 2)})["one"].response_error < 1
    (site,) = calibration.options(activations)
    assert {option.form for option in site.options} == {"dense", "channel"}


# -- inputs that do not vary


@pytest.mark.parametrize("limit", [10**6, 5])
@pytest.mark.parametrize("value", [0.0, 1.0, -1e6])
def test_constant_inputs_leave_a_site_dense(limit, value):
    weight = randn(1, 20, 12)
    activations = OneSite(torch.full((1, 50, 12), value), weight, y=randn(1, 50, 20), limit=limit)
    calibration = Calibration(solver=SOLVER)
    (site,) = calibration.options(activations)
    assert [option.form for option in site.options] == ["dense"]
    assert calibration.declined == {"one": CONSTANT}
    other = Calibration(solver=SOLVER)
    assert other.fit(activations, {"one": ("matmul", 2)}) == {}
    assert other.declined == {"one": CONSTANT}
    assert other.declined is not calibration.declined
    varied = OneSite(fading(), weight, limit=limit)
    assert list(other.fit(varied, {"one": ("matmul", 2)})) == ["one"]  # no longer declined
    assert other.declined == {}


def test_a_site_whose_input_becomes_constant_stays_dense(net):
    net.change_("c2", lambda array: 0 * array)
    calibration = Calibration(solver=SOLVER)
    options = {site.name: site.options for site in calibration.options(net.activations())}
    assert len(options["fc"]) == len(options["head"]) == 1
    assert len(options["c1"]) > 1
    assert calibration.declined == {"fc": CONSTANT, "head": CONSTANT}
    fitted = calibration.fit(net.activations(), {"c2": ("channel", 2), "fc": ("matmul", 2), "head": ("matmul", 2)})
    assert list(fitted) == ["c2"]
    assert fitted["c2"].response_error == 0


# -- the law


def test_a_power_law_goes_through_its_points():
    law = PowerLaw()
    for error in LEVELS:
        law.learn(error, Distance(error**2, 0.5 * error**2))
    for error in (*LEVELS, 0.05, 0.3):
        assert law(error) == pytest.approx(1.5 * error**2, rel=1e-6)
    low, high = LEVELS[0], LEVELS[-1]
    assert law(low / 10) == pytest.approx(law(low) / 10, rel=1e-6)
    assert law(high * 2) == pytest.approx(law(high) * 2**1.5, rel=1e-6)
    assert law(0) >= 0
    assert law.has_near(low * 1.1)
    assert not law.has_near(low * 1.5)


def test_distances_are_clipped():
    law = PowerLaw()
    law.learn(0.1, Distance(math.inf, math.inf))
    assert law(0.1) == pytest.approx(FARTHEST)
