"""The size of a model: bytes, parameters, multiply-accumulates."""

import pydantic


class Size(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The size of one model.

    Attributes:
        bytes: bytes of its file and data files; for the dense model those of the user's files (see
            `rsi_deploy.exporting.dense_size`).
        params: trained or quantized numbers, however they are stored (see `graph_passes.count_parameters`).
        macs: multiply-accumulates per sample.
    """

    bytes: pydantic.PositiveInt
    params: pydantic.NonNegativeInt
    macs: pydantic.NonNegativeInt
