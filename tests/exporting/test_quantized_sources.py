"""Quantized ONNX files as sources: their float weights are sites, the rest stays, and --requantize makes all float."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from calibrated_nets import IMAGE, conv_net, inputs
from int8_products import needs_exact_int8
from nets import mlp
from onnx import numpy_helper
from quantized_nets import IMAGES, TEXTS, answers, distance, quantized_net

from rsi_deploy import export, verify
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.onnx_models.inspection import inspect

WAYS = ("QDQ", "QOperator")
PLAIN = {"measure": False, "allow_larger": True}


def codes(path):
    """Bytes of the weights that are stored as integers."""
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return sorted(array.tobytes() for array in tensors if array.dtype.itemsize == 1 and array.ndim > 1)


def others(path):
    """Every node that does not belong to conv2, with its inputs and attributes."""
    nodes = [node for node in onnx.load(path).graph.node if not node.name.startswith("conv2")]
    return [(n.op_type, n.name, [a.SerializeToString() for a in n.attribute], list(n.input)[1:]) for n in nodes]


def statuses(bundle):
    return {claim.name: claim.status for claim in verify(bundle).claims}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_split_stays_as_it_is(tmp_path, way):
    source = quantized_net(tmp_path / "q.onnx", way=way, excluded=["conv2"])
    whole = export(str(source), tmp_path / "whole", rank="100%", always_split=True, keep_dense=True, **PLAIN)
    assert [site.name for site in whole.split_sites] == ["conv2"]
    assert others(tmp_path / "whole" / "model.onnx") == others(source) != []
    # Sums in another order move a few codes by one step.
    assert distance(answers(tmp_path / "whole" / "model.onnx", IMAGES), answers(source, IMAGES)) < 0.02
    assert codes(tmp_path / "whole" / "model.onnx") == codes(source) != []
    assert "broken" not in statuses(tmp_path / "whole").values()
    low = export(str(source), tmp_path / "low", rank=1, **PLAIN)
    assert low.verification.approximation.relative_l2 > 0.1, "a lost weight is noticed"


def test_calibration_reaches_the_float_part(tmp_path):
    source = quantized_net(tmp_path / "q.onnx", excluded=["conv2"])
    calib = inputs(tmp_path / "c.npz", *IMAGE, count=200, low_rank=4)
    report = export(str(source), tmp_path / "b", calib=calib, keep_macs=0.9, keep_dense=True, **PLAIN)
    assert [site.name for site in report.split_sites] == ["conv2"]
    assert report.precision is None
    assert "broken" not in statuses(tmp_path / "b").values()


@needs_exact_int8
@pytest.mark.parametrize(("net", "way"), [("images", "QDQ"), ("images", "dynamic"), ("texts", "blocks")])
def test_the_comparison_is_with_the_file_as_it_is(tmp_path, net, way):
    batch = IMAGES if net == "images" else TEXTS
    source = quantized_net(tmp_path / "q.onnx", net, way)
    settings = {"rank": "100%", "always_split": True, "requantize": True, "keep_dense": True}
    report = export(str(source), tmp_path / "b", **settings, **PLAIN)
    assert report.split_sites
    assert report.dense.bytes == source.stat().st_size
    assert np.array_equal(answers(tmp_path / "b" / "dense.onnx", batch), answers(source, batch))
    assert distance(answers(tmp_path / "b" / "model.onnx", batch), answers(source, batch)) < 0.02
    assert not codes(tmp_path / "b" / "model.onnx")
    assert "broken" not in statuses(tmp_path / "b").values()
    assert any("q.onnx" in note and "quantized" in note for note in report.notes)
    if way == "QDQ":  # rounded activations are part of what is compared with
        assert 1e-4 < report.verification.approximation.relative_l2 < 0.02
    content = json.loads((tmp_path / "b" / "report.json").read_text())
    content["verification"]["approximation"]["relative_l2"] += 0.1
    (tmp_path / "b" / "report.json").write_text(json.dumps(content))
    assert statuses(tmp_path / "b")["parity"] == "broken"


def test_a_requantized_model_is_planned_in_few_bits(tmp_path):
    source = quantized_net(tmp_path / "q.onnx")
    calib = inputs(tmp_path / "c.npz", *IMAGE, count=200, low_rank=4)
    settings = {"requantize": True, "precision": "int8", "keep_macs": 0.8, "allow_broken": True}
    report = export(str(source), tmp_path / "b", calib=calib, **settings, **PLAIN)
    assert report.precision.request == "int8"
    assert report.compressed.macs <= 0.8 * report.dense.macs
    assert report.precision.points[0].bytes == source.stat().st_size
    assert codes(tmp_path / "b" / "model.onnx")


def test_requests_that_do_not_fit_say_what_to_type(tmp_path):
    part, whole = (quantized_net(tmp_path / f"{n}.onnx", excluded=e) for n, e in (("part", ["conv2"]), ("whole", [])))
    blocks = quantized_net(tmp_path / "blocks.onnx", "texts", "blocks")
    calib = inputs(tmp_path / "c.npz", *IMAGE, count=100)
    plain = conv_net(tmp_path / "float.onnx")
    refusals = [
        (plain, {"rank": 4, "requantize": True}, UsageError, "leave out --requantize"),
        (mlp(), {"rank": 4, "requantize": True}, UsageError, "leave out --requantize"),
        (whole, {"rank": 4}, ModelError, "export --requantize"),
        (whole, {"keep_macs": 0.5, "calib": calib}, ModelError, "export --requantize"),
        (part, {"keep_macs": 0.5, "calib": calib, "precision": "int8"}, UsageError, "add --requantize"),
        (blocks, {"rank": 4, "requantize": True}, ModelError, "--allow-larger"),
    ]
    for source, settings, error, remedy in refusals:
        with pytest.raises(error, match=remedy) as raised:
            export(str(source) if isinstance(source, Path) else source, tmp_path / "b", measure=False, **settings)
        if error is ModelError and remedy == "export --requantize":
            assert "4 of its products" in str(raised.value)
        assert not (tmp_path / "b").exists()


def test_inspect_counts_products_of_few_bits(tmp_path):
    for excluded, count in (([], 4), (["conv2"], 3)):
        found = inspect(str(quantized_net(tmp_path / "q.onnx", excluded=excluded)), spectra=False)
        assert found.quantized_products == count
        assert any(f"{count} products" in note and "--requantize" in note for note in found.notes)
    plain = inspect(str(conv_net(tmp_path / "m.onnx")), spectra=False)
    assert plain.quantized_products == 0
    assert not plain.notes
