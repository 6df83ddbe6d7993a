"""Folders of models: configurations, the files that go along, and folders of transformers made ONNX folders."""
