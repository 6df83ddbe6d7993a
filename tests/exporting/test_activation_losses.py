"""The order in which sites go back to float32: by what rounding their inputs costs at the outputs."""

import numpy as np
import onnxruntime as ort
import pytest
from calibrated_nets import IMAGE, conv_net, inputs

from rsi_deploy.exporting.lowered.activation_losses import activation_losses, activation_steps
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.schemes import DYNAMIC, static


def site(name, noise, *, loss=0.1, error=0.01):
    dense = Option(form="dense", rank=None, params=10, macs=10, bytes=40, loss=0.0)
    split = Option(form="gemm", rank=1, params=5, macs=5, bytes=20, loss=loss, error=error)
    return SiteOptions(name=name, options=(dense, split), noise=noise)


def test_steps_are_those_of_the_ranges_of_the_data(tmp_path):
    source, path = conv_net(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    x = np.load(inputs(tmp_path / "c.npz", *IMAGE, count=32, low_rank=4))["x"]
    data = CalibrationFeeds(feeds=lambda: iter([{"input": x}]), samples=32)
    lower(source, path, Lowering(scheme=static("minmax")), data)
    steps = activation_steps(path)
    assert {"conv1", "conv2", "grouped", "head"} <= set(steps)
    assert steps["conv1"] == pytest.approx((x.max() - x.min()) / 255, rel=1e-3)
    assert len(set(steps.values())) > 2
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"input": x})[0]).all()
    lower(source, path, Lowering(scheme=DYNAMIC), data)
    assert activation_steps(path) == {}  # their ranges are found at run time


def test_a_loss_follows_noise_step_and_sensitivity():
    sites = [site("a", 1.0), site("b", 4.0), site("sensitive", 1.0, loss=0.3), site("known by none", 0.0)]
    losses = activation_losses(sites, dict.fromkeys(("a", "b", "sensitive", "known by none"), 0.1))
    assert losses["a"] == pytest.approx(0.1 * (0.1**2 / 12) / 0.01)
    assert losses["b"] == pytest.approx(4 * losses["a"])
    assert losses["sensitive"] == pytest.approx(3 * losses["a"])
    assert losses["known by none"] == 0
    twice = activation_losses(sites, dict.fromkeys(("a", "b"), 0.2))
    assert twice["a"] == pytest.approx(4 * losses["a"])
    assert twice["sensitive"] == 0  # no step is known


def test_an_option_of_about_the_same_error_gives_the_loss():
    dense, coarse = site("a", 1.0, loss=1.0, error=1e-1).options
    fine = site("a", 1.0, loss=1e-3, error=1e-3).options[1]
    near_fine = SiteOptions(name="a", options=(dense, coarse, fine), noise=12 * 2e-3)
    near_coarse = SiteOptions(name="a", options=(dense, coarse, fine), noise=12 * 5e-2)
    assert activation_losses([near_fine], {"a": 1.0})["a"] == pytest.approx(2e-3)
    assert activation_losses([near_coarse], {"a": 1.0})["a"] == pytest.approx(0.5)
