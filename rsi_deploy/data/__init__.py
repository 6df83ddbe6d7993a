"""Calibration and evaluation data: arrays, image folders, Arrow files, callables; preprocessing and batches."""
