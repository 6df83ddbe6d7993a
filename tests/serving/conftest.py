import shutil
from pathlib import Path

import pytest

from rsi_deploy import export

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A real bundle of the sample CNN, with its dense model."""
    pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
    folder = tmp_path_factory.mktemp("served") / "digits"
    export(
        "samples.digits:cnn",
        checkpoint=SAMPLES / "digits_cnn.safetensors",
        rank="25%",
        include=["classifier.fc*"],
        output=folder,
        measure=False,
        keep_dense=True,
    )
    return folder


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(digits, tmp_path / "digits"))
