"""Compress a torch network: `python -m samples.compress_torch` in the root of the repository. Writes `torch-bundle`."""

# %% A trained network: the digit transformer, in evaluation mode.
from pathlib import Path

import torch
from safetensors.torch import load_model

import rsi_deploy
from samples import digits

SAMPLES = Path(digits.__file__).parent

net = digits.vit()
load_model(net, SAMPLES / "digits_vit.safetensors")
net.eval()

# %% Keep 35 % of the parameters. Unlabelled images decide the ranks; labelled ones only measure the result.
report = rsi_deploy.export(
    net,
    "torch-bundle",
    keep_params=0.35,
    calib=SAMPLES / "digits_calib.npz",
    data=SAMPLES / "digits_eval.npz",
    measure=False,  # no latency here: see samples/latency_budget.py
    force=True,
)

# %% What was done, layer by layer, and what it costs.
for site in report.sites:
    print(f"{site.name:40} {site.decision:6} {site.rank or '':>4}  {site.reason}")
assert report.accuracy is not None
print(f"parameters {report.dense.params:,} -> {report.compressed.params:,}")
print(f"top-1 {report.accuracy.dense.top1:.2f} % -> {report.accuracy.compressed.top1:.2f} %")

# %% Or stay in PyTorch: the same factors as trainable layers, in place.
records = rsi_deploy.compress_(net, "25%", exclude=["head", "patches.project"])
print(f"{sum(record.decision == 'split' for record in records)} of {len(records)} layers are low-rank now")
print(net(torch.zeros(2, *net.input_shape[1:])).shape)
