"""What PyTorch modules read and write while a model runs on calibration data."""
