"""What the sites of an ONNX graph read and write while the model runs on calibration data."""
