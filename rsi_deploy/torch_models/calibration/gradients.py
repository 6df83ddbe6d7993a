"""Output sensitivities of a torch module: hooks tap the responses of its sites, and autograd computes gradients there.

    x --layer--> y,  tapped   --clone--> ... --> z --(probe u)--> g at the tap

The clone allows later layers to overwrite the response (`ReLU(inplace=True)`) without changing the tap. Parameters
require no gradients during the run, so the first tap is a leaf and nothing before it is kept for the backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from rsi_deploy.calibration.activations import CalibratedSite, OutputSensitivity
from rsi_deploy.calibration.output_sensitivity import SensitivityAccumulator, are_token_scores
from rsi_deploy.torch_models.calibration.calls import Layer
from rsi_deploy.torch_models.calibration.runs import Arguments, Runs, aligned, samples_of

Taps = list[tuple[str, Tensor]]


def output_sensitivities(
    module: nn.Module, runs: Runs, layers: Sequence[Layer], sites: Mapping[str, CalibratedSite], *, seed: int
) -> dict[str, OutputSensitivity]:
    """Return the output sensitivities by site name, without sites that do not affect the output.

    Args:
        module: module of `runs`.
        runs: runs of the module on its data.
        layers: layers of the sites.
        sites: sites by name.
        seed: random seed of the probes.

    Raises:
        NoSensitivityError: gradients do not reach a site, or need too much memory.
    """
    accumulator = SensitivityAccumulator(sites, runs.samples, seed=seed)
    with _frozen(module):
        for batch in runs.batches():
            for piece, numbers in _pieces(batch, accumulator):
                taps: Taps = []
                with accumulator.bounded_gradients(samples_of(piece), module.parameters()):
                    z = runs.output(piece, _tapped(layers, taps))
                accumulator.add_gradients(z, taps, numbers, are_scores=are_token_scores(z.shape))
    return accumulator.result()


def _pieces(batch: Arguments, accumulator: SensitivityAccumulator) -> Iterator[tuple[Arguments, list[int]]]:
    """Yield pieces of the chosen samples of a batch with their indices. A batch that is not aligned stays whole."""
    count, begin = samples_of(batch), accumulator.seen
    at = torch.from_numpy(accumulator.choose(count))
    if not aligned(batch):
        if len(at):
            yield batch, list(range(begin, begin + count))
        return
    for part in accumulator.pieces(len(at)):
        yield tuple(a[at[part].to(a.device)] for a in batch), (begin + at[part]).tolist()


@contextmanager
def _tapped(layers: Sequence[Layer], taps: Taps) -> Iterator[None]:
    """Turn gradients on, and append (site, response) of every call of the layers to `taps`."""

    def hook(site: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def behind(module: nn.Module, args: object, y: Tensor) -> Tensor:
            tap = y if y.requires_grad else y.detach().requires_grad_()
            taps.append((site, tap))
            return tap.clone()

        return behind

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.module.register_forward_hook(hook(layer.site)))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Turn off the gradients of all parameters."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
