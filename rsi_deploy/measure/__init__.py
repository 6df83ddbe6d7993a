"""Latency and accuracy of ONNX models on onnxruntime, and the machine they were measured on."""
