"""PyTorch models: where they come from, their export to ONNX, low-rank layers and compression in place."""
