"""The samples are what their README says: size, accuracy, and an evaluation split that training never saw."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samples import digits
from samples.digits_data import prepare, scans, split
from samples.train_digits import accuracy

SAMPLES = Path(digits.__file__).parent
FACTORIES = {"cnn": digits.cnn, "vit": digits.vit}
LEAST_ACCURACY = 97.0
"""Percent top-1 on the evaluation third."""


@pytest.fixture(params=sorted(FACTORIES))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    sample = FACTORIES[request.param]()
    sample.load_state_dict(load_file(SAMPLES / f"digits_{request.param}.safetensors"), strict=True)
    return sample.eval()


@pytest.fixture(scope="module")
def evaluation() -> tuple[np.ndarray, np.ndarray]:
    with np.load(SAMPLES / "digits_eval.npz", allow_pickle=False) as stored:
        return stored["images"], stored["labels"]


@pytest.fixture(scope="module")
def calibration() -> np.ndarray:
    with np.load(SAMPLES / "digits_calib.npz", allow_pickle=False) as stored:
        assert stored.files == ["images"], "calibration data carry no labels"
        return stored["images"]


def test_both_weights_stay_under_four_megabytes() -> None:
    assert sum((SAMPLES / f"digits_{name}.safetensors").stat().st_size for name in FACTORIES) < 4_000_000


def test_the_module_tells_its_inputs(model: torch.nn.Module) -> None:
    assert model.input_shape == (1, 1, 8, 8)
    assert set(model.preprocessing) == {"mean", "std", "layout"}
    assert model(torch.zeros(model.input_shape)).shape == (1, 10)


def test_accuracy_and_its_control(model: torch.nn.Module, evaluation: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = evaluation
    inputs = prepare(images)
    assert accuracy(model, inputs, torch.from_numpy(labels)) >= LEAST_ACCURACY
    shuffled = np.random.default_rng(0).permutation(labels)
    assert accuracy(model, inputs, torch.from_numpy(shuffled)) < 20, "the accuracy check accepts any labels"


def test_sites_have_readable_names() -> None:
    cnn = ["features.conv1", "features.conv2", "classifier.fc1", "classifier.fc2", "classifier.head"]
    assert weights_of(digits.cnn()) == [f"{site}.weight" for site in cnn]
    block = ["attention.in_proj_weight", "attention.out_proj.weight", "mlp.0.weight", "mlp.2.weight"]
    blocks = [f"blocks.{i}.{site}" for i in range(3) for site in block]
    assert weights_of(digits.vit()) == ["patches.project.weight", *blocks, "head.weight"]


def weights_of(model: torch.nn.Module) -> list[str]:
    """Names of the matrices and kernels, positions left out."""
    return [name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("position")]


def test_random_weights_do_not_pass(evaluation: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = evaluation
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = digits.vit()
    assert accuracy(untrained, prepare(images), torch.from_numpy(labels)) < 50


def test_arrays_are_labelled_eight_bit_images(
    evaluation: tuple[np.ndarray, np.ndarray], calibration: np.ndarray
) -> None:
    images, labels = evaluation
    assert (images.shape, images.dtype) == ((599, 8, 8, 1), np.uint8)
    assert (labels.shape, labels.dtype) == ((599,), np.int64)
    assert (calibration.shape, calibration.dtype) == ((512, 8, 8, 1), np.uint8)


def test_the_evaluation_split_is_the_fixed_third(
    evaluation: tuple[np.ndarray, np.ndarray], calibration: np.ndarray
) -> None:
    pytest.importorskip("sklearn", reason="load_digits comes with scikit-learn")
    images, labels = scans()
    training, held_out = split(labels)
    assert sorted([*training, *held_out]) == list(range(1797)), "the two parts share or miss an image"
    np.testing.assert_array_equal(evaluation[0], images[held_out])
    np.testing.assert_array_equal(evaluation[1], labels[held_out])
    np.testing.assert_array_equal(calibration, images[training[:512]])


def test_no_calibration_image_is_an_evaluation_image(
    evaluation: tuple[np.ndarray, np.ndarray], calibration: np.ndarray
) -> None:
    assert not {image.tobytes() for image in evaluation[0]} & {image.tobytes() for image in calibration}


@pytest.mark.parametrize("name", ["compress_torch", "latency_budget", "serve_and_roll_out"])
def test_the_scripts_run(name: str, tmp_path: Path) -> None:
    script = SAMPLES / f"{name}.py"
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert text.count("\n# %% ") >= 3
    if name.startswith("serve"):
        pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
    environment = {**os.environ, "SAMPLE_SECONDS": "1", "PYTHONPATH": os.pathsep.join([str(SAMPLES.parent), *sys.path])}
    command = [sys.executable, "-m", f"samples.{name}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert WANTED[name].search(done.stdout), done.stdout


WANTED = {
    "compress_torch": re.compile(r"top-1 99\.\d+ % -> 9\d\.\d+ %"),
    "latency_budget": re.compile(r"speed-up|--keep-latency"),  # or the machine is too busy to tell, and that is said
    "serve_and_roll_out": re.compile(r"shadow: \{'1': 40\}.*agreement: \d.*canary: \{'1': 36, '2': 4\}", re.S),
}
