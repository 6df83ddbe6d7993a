"""Inputs and outputs of the sites of an ONNX graph while the model runs on calibration data."""
