"""The settings of an export, as its report keeps them."""

from typing import Literal

import pydantic


class ExportSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What the user asked for, as far as it shapes model.onnx.

    Attributes:
        rank: as typed: "64" or "40%"; "" where a budget or a plan decided.
        budget: as typed, such as "--keep-macs 50%", "--max-drop 1" or "--plan plan.json"; "" where a rank decided.
        factors: "weights": of the weights alone; "response": fitted to calibration data.
        calib_size: most calibration samples; 0 where there were none.
        min_rank, rank_multiple: what planned ranks were held to.
        method: "rsi", "rsvd" or "svd".
        power_iterations: the paper's q, or "auto".
        oversampling: extra sketch columns.
        seed: of sketches and probe inputs.
        include, exclude: globs on site names.
        always_split: split where nothing is saved, too.
        joint: weights that multiply the same input may share one right factor; never with `always_split`.
        opset: of the ONNX model.
        route: of the kernel: "auto" or the one that was forced; each site names the one it took.
        mixed_precision: whether the kernel might iterate in bfloat16.
    """

    rank: str
    method: str
    power_iterations: int | Literal["auto"]
    oversampling: int
    seed: pydantic.NonNegativeInt
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    always_split: bool
    joint: bool = False
    budget: str = ""
    factors: Literal["weights", "response"] = "weights"
    calib_size: int = 0
    min_rank: int = 1
    rank_multiple: int = 1
    opset: int
    route: str = "direct"
    mixed_precision: bool = False
