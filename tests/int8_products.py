"""Whether this CPU multiplies int8 exactly: onnxruntime's kernels for AVX2 alone add pairs of products in 16 bits."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest


@functools.cache
def are_exact():
    """Return whether a product of the largest numbers is what it should be."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (uint8[4, 64] x) => (int32[4, 32] y) { y = MatMulInteger(x, w) }""")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((64, 32), 127, np.int8), "w"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool((session.run(None, {"x": np.full((4, 64), 255, np.uint8)})[0] == 64 * 127 * 255).all())


needs_exact_int8 = pytest.mark.skipif(not are_exact(), reason="int8 products of this CPU saturate: it has no VNNI")
