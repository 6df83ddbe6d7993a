"""Activations of PyTorch modules on calibration data."""
