"""The settings of an export in its report."""

from typing import Literal

import pydantic


class ExportSettings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The settings that shape model.onnx.

    Attributes:
        rank: as it is typed: "64" or "40%"; "" where a budget or a plan decided.
        budget: as it is typed, such as "--keep-macs 50%" or "--plan plan.json"; "" where a rank decided.
        factors: "weights": factors of the weights alone; "response": factors fitted to calibration data.
        calib_size: most calibration samples; 0 where there were none.
        min_rank, rank_multiple: smallest planned rank, and the number that planned ranks are multiples of.
        method: "rsi", "rsvd" or "svd".
        power_iterations: the paper's q, or "auto".
        oversampling: extra sketch columns.
        seed: random seed for sketches, probe inputs and random weights.
        include, exclude: globs on site names.
        always_split: whether sites are split where nothing is saved, too.
        joint: whether weights of the same input may share one right factor; never with `always_split`.
        opset: opset of the ONNX model; 0 where none was chosen.
        route: route of the kernel: "auto", or the one that was chosen; each site names the one it took.
        mixed_precision: whether the kernel may iterate in bfloat16.
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
