"""Low precision: quantized models of onnxruntime, 4-bit storage, and the choice among them."""
