"""What rounding the inputs of a site costs at the outputs: the order in which sites are left in float32.

error of a site = |W n|^2 / |W x|^2,  n: white noise of the variance step^2 / 12
loss            = the site's loss at that error, as its other options have it
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import numpy_helper

from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.planning.knapsack import SiteOptions


def activation_steps(path: Path) -> dict[str, float]:
    """Return name of a node -> step of its quantized input, for the products of a model in static int8."""
    model = read_proto(path, with_data=True)
    made = {name: node for node in model.graph.node for name in node.output}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        maker = made.get(node.input[0]) if node.name and node.input else None
        if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[1] in known:
            found[node.name] = float(np.max(numpy_helper.to_array(known[maker.input[1]])))
    return found


def activation_losses(options: Sequence[SiteOptions], steps: Mapping[str, float]) -> dict[str, float]:
    """Return name of a site -> loss of the outputs when its inputs alone are rounded.

    Args:
        options: options of the sites, with their response errors and losses.
        steps: name of a site -> step of its inputs; others have no loss.
    """
    losses = {}
    for site in options:
        error = site.noise * steps.get(site.name, 0.0) ** 2 / 12
        known = [option for option in site.options if option.error > 0]
        if error <= 0 or not known:
            losses[site.name] = 0.0
            continue
        nearest = min(known, key=lambda option: abs(math.log(option.error / error)))
        losses[site.name] = nearest.loss * error / nearest.error
    return losses
