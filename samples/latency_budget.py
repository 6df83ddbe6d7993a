"""Compress an ONNX file under a latency budget: `python -m samples.latency_budget`. Writes `latency-bundle`."""

# %% An ONNX file, as it may come from anywhere: the digit CNN, with a dynamic batch.
import os
from pathlib import Path

import torch
from safetensors.torch import load_model

import rsi_deploy
from samples import digits

SAMPLES = Path(digits.__file__).parent
SECONDS = float(os.environ.get("SAMPLE_SECONDS", "10"))  # for each measurement; more is more certain

net = digits.cnn()
load_model(net, SAMPLES / "digits_cnn.safetensors")
example = torch.zeros(2, *net.input_shape[1:])
torch.onnx.export(net.eval(), (example,), "digits.onnx", dynamo=True, input_names=["input"], dynamic_shapes=({0: "N"},))

# %% How pictures become inputs. The file does not say, so we do.
steps = rsi_deploy.Preprocessing(**digits.PREPROCESSING)

# %% At most 80 % of the time of a call. Candidates are measured on this machine, each beside the dense model.
try:
    report = rsi_deploy.export(
        "digits.onnx",
        "latency-bundle",
        keep_latency=0.8,
        calib=SAMPLES / "digits_calib.npz",
        data=SAMPLES / "digits_eval.npz",
        preprocessing=steps,
        threads=1,
        cost_budget=SECONDS,
        bench_seconds=SECONDS,
        force=True,
    )
except rsi_deploy.ModelError as error:  # no split is fast enough here: the message names the fastest
    print(error)
    raise SystemExit(0) from None

# %% What came out. Speed is a property of the machine, so the interval stands beside it.
assert report.latency is not None
dense, compressed = report.latency.arms
print(f"{dense.median_ms:.3f} ms -> {compressed.median_ms:.3f} ms, speed-up {compressed.speedup_interval}")
assert report.accuracy is not None
print(f"top-1 {report.accuracy.dense.top1:.2f} % -> {report.accuracy.compressed.top1:.2f} %")
for note in report.notes:
    print(f"note: {note}")
