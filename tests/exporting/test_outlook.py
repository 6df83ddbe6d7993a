"""`inspect --calib`: what unseen data keep of each site and of the whole model."""

import json

import numpy as np
import pytest
from calibrated_nets import inputs
from nets import mlp_onnx

from rsi_deploy.cli import run
from rsi_deploy.report.outlook import Outlook, point_outlook, site_outlook


def outlook(tmp_path, capsys, *options, middle=None, **data):
    changed = {} if middle is None else {"fc2": middle}
    mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10), **changed)
    calib = inputs(tmp_path / "c.npz", 12, **data)
    assert run(["inspect", str(tmp_path / "m.onnx"), "--calib", str(calib), "--no-spectra", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == 3, "the rest of the document stays"
    verdict = found["data"].pop("verdict")
    parsed = Outlook.model_validate(found["data"])
    assert parsed.verdict == verdict
    return parsed


def test_a_net_with_a_middle_of_rank_six_can_be_compressed(tmp_path, capsys):
    rng = np.random.default_rng(3)
    middle = rng.standard_normal((48, 6)) @ rng.standard_normal((6, 48)) / 6
    found = outlook(tmp_path, capsys, middle=middle, count=400, low_rank=4)
    assert (found.samples, found.check_samples) == (320, 80)
    assert [point.share for point in found.points] == [0.9, 0.8, 0.7, 0.5]
    assert "can hardly" not in found.verdict
    errors = {site.name: site.in_sample for site in found.sites}
    assert errors["fc2"] < 0.01
    assert {site.name: site.rank for site in found.sites} == {"fc1": 4, "fc2": 12, "head": 4}
    assert len(site_outlook(found).rows) == 3
    assert "agreement" in point_outlook(found).rows[0][1]


def test_a_net_that_cannot_be_compressed_says_so(tmp_path, capsys):
    found = outlook(tmp_path, capsys, count=400, low_rank=0)
    agreements = [point.quality.agreement for point in found.points]
    assert agreements[-1] < agreements[0] < 99
    assert "can hardly be compressed with these data: at 90%" in found.verdict


@pytest.mark.parametrize("options", [["--include", "fc2"]])
def test_filters_count(tmp_path, capsys, options):
    assert [site.name for site in outlook(tmp_path, capsys, *options, count=200).sites] == ["fc2"]
