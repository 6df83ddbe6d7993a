"""The float16 variant of a float32 model, by onnxruntime's own converter (`onnxruntime.transformers.float16`).

It comes with onnxruntime, is the maintained form of what `onnxconverter-common` has, and needs neither torch nor
transformers. Inputs and outputs stay float32, so that the arms are fed alike. A CPU that has no float16 arithmetic
casts around every node: slower, and that is what the measurement shows.
"""

from pathlib import Path

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_maps import remove_map_types_
from rsi_deploy.io.onnx_reader import read_proto


def float16_file(model: Path, folder: Path) -> Path:
    """Write the float16 variant of `model` into `folder`.

    Raises:
        UsageError: a model in onnxruntime's own format.
        ModelError: it cannot be read or converted.
    """
    import onnx
    import onnx_ir as ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if model.suffix == ".ort":
        raise UsageError(f"{model} is in onnxruntime's own format and cannot be converted; give the .onnx file")
    loaded = read_proto(model, with_data=True)
    try:
        half = convert_float_to_float16(loaded, keep_io_types=True)
        remove_map_types_(half)  # onnx_ir has none; onnxruntime infers them
        made = ir.serde.deserialize_model(half)
        made.graph.sort()  # the converter's casts stand behind the nodes that use them, which no ONNX file may have
        converted = ir.serde.serialize_model(made)
    except Exception as error:  # the converter's and protobuf's own
        said = str(error).strip() or type(error).__name__  # it asserts without a word
        raise ModelError(
            f"{model}: onnxruntime's converter cannot make it float16: {said}; measure it with --dtype stored"
        ) from error
    path = folder / f"{model.stem}.float16.onnx"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"{model.stem}.float16.{number}.onnx"
    onnx.save(converted, str(path), save_as_external_data=converted.ByteSize() > 2**30, location=f"{path.name}.data")
    return path
