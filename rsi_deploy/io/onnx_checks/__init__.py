"""Checks of an ONNX file's bytes before anything parses it, and of a parsed model before anything runs it."""
