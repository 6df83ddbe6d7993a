"""The size of the dense model as the user has it, with which a compressed model is compared.

an ONNX file     the file itself and its data files, before anything is folded, renamed or written again
a torch model    what the exporter makes of it, as one file
"""

from pathlib import Path

from graph_passes import count_parameters
from rsi_deploy.core.model_size import Size
from rsi_deploy.io.onnx_file import bytes_in_one_file, bytes_with_external_files
from rsi_deploy.io.onnx_reader import load_model


def dense_size(source: Path | None, dense: Path, *, requantized: bool = False) -> Size:
    """Return bytes and parameters of the dense model; its MACs are 0.

    Args:
        source: the user's ONNX file; None for a torch model.
        dense: dense model that was made of it.
        requantized: whether the dense model has float weights for those of few bits: its parameters count then.

    Raises:
        ModelError: a file cannot be read.
    """
    if source is None:
        return Size(bytes=bytes_in_one_file(dense), params=count_parameters(load_model(dense)), macs=0)
    counted = load_model(dense if requantized else source)
    return Size(bytes=bytes_with_external_files(source), params=count_parameters(counted), macs=0)
