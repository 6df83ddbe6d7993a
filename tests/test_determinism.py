"""The same bytes: across runs, and across one and two threads or the report says what differs and why.

Each export is a process of its own, as a user's is. What may vary by nature is the list below, and nothing else may.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nets import mlp_onnx, run_onnx

ROOT = Path(__file__).parents[1]
MAIN = "from rsi_deploy.cli import main; main()"
SAMPLES = ROOT / "samples"
DIGITS = ["samples.digits:cnn", "--checkpoint", SAMPLES / "digits_cnn.safetensors", "--include", "classifier.fc*"]
CALIBRATED = ["--calib", SAMPLES / "digits_calib.npz", "--calib-size", "256", "--keep-params", "0.5"]

# Paths in report.json whose values are times, memory and the machine's state; manifest.json has report.json's hash.
VARIES = re.compile(
    r"\.created|\.peak_memory|\.sites\[\d+\]\.seconds|\.stages\[\d+\]\.seconds"
    r"|\.environment\.(load_average|clock_mhz|torch_threads|affinity).*"
)
ERRORS = re.compile(r"\.sites\[\d+\]\.(spectral_error|normalized_error|residual_interval\[\d\])")
HOLD_TIMES = {"report.json", "report.html", "manifest.json"}


def export(folder, name, *arguments, threads):
    """Export without measuring times, in a process of its own with so many threads; the bundle's folder."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "RSI_DEPLOY_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", MAIN, "export", *map(str, arguments), "--no-bench", "-o", "bundle"]
    (folder / name).mkdir()
    done = subprocess.run(command, cwd=folder / name, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name / "bundle"


def differences(one, other, path=""):
    """Path and both values wherever two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for index, pair in pairs for found in differences(*pair, f"{path}[{index}]")]
    return [] if one == other else [(path, one, other)]


def unlike(a, b, rounding=0.0):
    """What differs between two bundles that must be equal: file names, and paths in report.json that may not vary.

    Errors of sites may differ by `rounding`, relative: they are measured with other sums where the threads are others.
    """
    files = [path.name for path in sorted(a.iterdir()) if path.name not in HOLD_TIMES]
    assert {path.name for path in b.iterdir()} == {*files, *HOLD_TIMES}
    found = [name for name in files if (a / name).read_bytes() != (b / name).read_bytes()]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (a, b)]
    for path, one, other in differences(*reports):
        near = ERRORS.fullmatch(path) is not None and one == pytest.approx(other, rel=rounding, abs=0)
        if not near and not VARIES.fullmatch(path):
            found.append(path)
    return found


@pytest.fixture
def model(tmp_path):
    return mlp_onnx(tmp_path / "m.onnx", sizes=(96, 256, 192, 10))


def test_an_onnx_export_is_the_same_with_one_thread_and_two(tmp_path, model):
    """Twice with one thread and once with two; both checks see another seed."""
    options = [model, "--rank", "4", "--route", "chebyshev"]
    first = export(tmp_path, "first", *options, threads=1)
    assert unlike(first, export(tmp_path, "again", *options, threads=1)) == []
    assert unlike(first, export(tmp_path, "two", *options, threads=2), rounding=1e-6) == []
    other = export(tmp_path, "other", *options, "--seed", "1", threads=1)
    assert {"model.onnx", ".settings.seed"} <= set(unlike(first, other))
    assert distance(first / "model.onnx", first / "model.onnx", (32, 96)) == 0
    assert distance(first / "model.onnx", other / "model.onnx", (32, 96)) > 1e-3


@pytest.mark.parametrize("how", [["--rank", "25%"], CALIBRATED], ids=["weights", "calibrated"])
def test_the_digits_are_the_same_tomorrow_and_say_what_another_thread_changes(tmp_path, how):
    """With two threads exact factors, and sums over data, are rounded otherwise: the report tells the threads."""
    first = export(tmp_path, "first", *DIGITS, *how, threads=1)
    assert unlike(first, export(tmp_path, "again", *DIGITS, *how, threads=1)) == []
    two = export(tmp_path, "two", *DIGITS, *how, threads=2)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, two)]
    assert [report["environment"]["torch_threads"] for report in reports] == [1, 2]
    assert [site["rank"] for site in reports[0]["sites"]] == [site["rank"] for site in reports[1]["sites"]]
    assert distance(first / "model.onnx", two / "model.onnx", (32, 1, 8, 8)) <= 1e-5


def distance(a, b, shape):
    """Relative difference of two models' outputs on the same random inputs."""
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    one, other = (run_onnx(path, x)[0] for path in (a, b))
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))
