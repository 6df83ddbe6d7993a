"""Sweeps: many exports of one calibration, from nearly dense to small."""
