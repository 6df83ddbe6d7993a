"""Calibration and evaluation data: arrays, image folders, Arrow files, Python functions; preprocessing and batches."""
