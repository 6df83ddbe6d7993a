"""What a model takes: bytes, parameters, multiply-accumulates."""

import pydantic


class Size(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Of one model.

    Attributes:
        bytes: of its file and its data files; of the dense model, as the user has it (see
        `rsi_deploy.exporting.dense_size`). params: trained or quantized numbers, however they are stored (see
        `graph_passes.count_parameters`). macs: multiply-accumulates a sample.
    """

    bytes: pydantic.PositiveInt
    params: pydantic.NonNegativeInt
    macs: pydantic.NonNegativeInt
