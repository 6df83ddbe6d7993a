"""A Preprocessing and the settings of pictures say the same."""

import pytest

from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.data.picture_settings import picture_settings, preprocessing_of
from rsi_deploy.data.preprocess import Preprocessing


@pytest.mark.parametrize(
    "steps",
    [
        Preprocessing(mean=(0.25,), std=(2.0,)),
        Preprocessing(resize=None, crop=None),
        Preprocessing(resize=8, crop=(3, 4), layout="NHWC", interpolation="bicubic", dtype="float16"),
        Preprocessing(),
    ],
)
def test_a_preprocessing_and_its_settings_are_the_same(steps):
    assert preprocessing_of(ExportConfig.of(**picture_settings(steps))) == steps
    assert preprocessing_of(ExportConfig.of()) is None is preprocessing_of(ExportConfig.of(**picture_settings(None)))
