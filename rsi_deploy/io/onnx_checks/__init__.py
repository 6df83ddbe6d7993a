"""Checks of an ONNX file before it is parsed, and of a parsed model before it runs."""
