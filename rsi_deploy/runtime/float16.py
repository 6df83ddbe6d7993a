"""Convert a float32 model to float16 with onnxruntime's converter (`onnxruntime.transformers.float16`).

It comes with onnxruntime, is the maintained successor of `onnxconverter-common`, and needs neither torch nor
transformers. Inputs and outputs stay float32, so that all variants take the same feeds. A CPU without float16
arithmetic casts around every node, and the measurement shows that it is slower.
"""

from pathlib import Path

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_maps import remove_map_types_
from rsi_deploy.io.onnx_reader import read_proto


def float16_file(model: Path, folder: Path) -> Path:
    """Write the float16 variant of `model` into `folder`.

    Raises:
        UsageError: The model is in onnxruntime's own format.
        ModelError: The model cannot be read or converted.
    """
    import onnx
    import onnx_ir as ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if model.suffix == ".ort":
        raise UsageError(f"{model} is in onnxruntime's own format and cannot be converted", hint="give the .onnx file")
    loaded = read_proto(model, with_data=True)
    try:
        half = convert_float_to_float16(loaded, keep_io_types=True)
        remove_map_types_(half)  # onnx_ir cannot hold them; onnxruntime infers them
        converted = ir.serde.deserialize_model(half)
        converted.graph.sort()  # the converter puts casts behind the nodes that use them, which is invalid ONNX
        proto = ir.serde.serialize_model(converted)
    except Exception as error:  # of the converter, or of protobuf
        message = str(error).strip() or type(error).__name__  # its assertions have no message
        raise ModelError(
            f"{model}: onnxruntime's converter cannot make it float16: {message}", hint="measure it with --dtype stored"
        ) from error
    path = folder / f"{model.stem}.float16.onnx"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{model.stem}.float16.{number}.onnx"
    onnx.save(proto, str(path), save_as_external_data=proto.ByteSize() > 2**30, location=f"{path.name}.data")
    return path
