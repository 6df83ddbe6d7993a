"""One small sweep, for the tests of sweeps."""

import numpy as np
from nets import SIZES, labelled, mlp_onnx

import rsi_deploy

QUICK = {"points": 3, "highest": 0.9, "lowest": 0.4, "measure": False}


def filled(folder):
    """The folder, with a model `m.onnx`, evaluation data `d.npz` and calibration data `c.npz`."""
    labelled(folder / "d.npz", mlp_onnx(folder / "m.onnx"))
    np.savez(folder / "c.npz", x=np.random.default_rng(3).standard_normal((128, SIZES[0])).astype(np.float32))
    return folder


def swept(place, output, **options):
    """A sweep of the model in a filled folder."""
    model = str(place / "m.onnx")
    return rsi_deploy.sweep(model, output, calib=place / "c.npz", data=place / "d.npz", **{**QUICK, **options})
