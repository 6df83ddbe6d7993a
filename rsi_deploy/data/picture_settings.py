"""The settings of pictures (`--mean`, `--resize`, ...) and the `Preprocessing` that they state, in both directions."""

from typing import Any

from rsi_deploy.core.settings.groups import PictureConfig
from rsi_deploy.data.preprocess import Preprocessing

SETTINGS = {"dtype": "input_dtype"}
"""Fields of `Preprocessing` whose settings have another name."""


def picture_settings(steps: Preprocessing | None) -> dict[str, Any]:
    """Return the settings that say the same as a `Preprocessing`: the fields that were set in it.

    Example:
        >>> picture_settings(Preprocessing(crop=(3, 4), resize=None))
        {'resize': 'none', 'crop': (3, 4)}
    """
    if steps is None:
        return {}
    names = [name for name in Preprocessing.model_fields if name in steps.model_fields_set] or ["scale"]
    values = {SETTINGS.get(name, name): getattr(steps, name) for name in names}
    return {name: "none" if value is None else value for name, value in values.items()}


def preprocessing_of(config: PictureConfig) -> Preprocessing | None:
    """Return the steps that the settings state; None where none of them is set.

    Raises:
        UsageError: `mean` and `std` of different lengths, or sizes that no picture has.
    """
    given = config.part(PictureConfig)
    fields = {name: SETTINGS.get(name, name) for name in Preprocessing.model_fields}
    found = {name: None if given[key] == "none" else given[key] for name, key in fields.items() if key in given}
    if isinstance(found.get("crop"), int):
        found["crop"] = (found["crop"], found["crop"])
    return Preprocessing(**found) if found else None
