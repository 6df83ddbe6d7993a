"""Metrics of the sites of a torch module: autograd behind them, by hooks.

    x --layer--> y,  tapped   --clone--> ... --> z --(probe u)--> g at the tap

The clone lets what follows write over the response (`ReLU(inplace=True)`) without changing what was tapped. Parameters
ask for no gradient meanwhile: the first tap of a run is a leaf, and what stands before it keeps nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from rsi_deploy.calibration.activations import CalibratedSite, OutputSensitivity
from rsi_deploy.calibration.output_sensitivity import SensitivityAccumulator
from rsi_deploy.torch_models.calibration.calls import Layer
from rsi_deploy.torch_models.calibration.runs import Arguments, Runs, aligned, samples_of

Taps = list[tuple[str, Tensor]]


def output_sensitivities(
    module: nn.Module, runs: Runs, layers: Sequence[Layer], sites: Mapping[str, CalibratedSite], *, seed: int
) -> dict[str, OutputSensitivity]:
    """By the names of sites; those that move no output have none.

    Args:
        module: as in `runs`.
        runs: of the module, and its data.
        layers: what is called where the weights of `sites` are used.
        sites: by name.
        seed: of the probes.

    Raises:
        NoSensitivityError: gradients do not pass, or take too much memory.
    """
    accumulator = SensitivityAccumulator(sites, runs.samples, seed=seed)
    with _frozen(module):
        for batch in runs.batches():
            for piece, numbers in _pieces(batch, accumulator):
                taps: Taps = []
                with accumulator.bounded_gradients(samples_of(piece), module.parameters()):
                    z = runs.output(piece, _tapped(layers, taps))
                accumulator.add_gradients(z, taps, numbers)
    return accumulator.result()


def _pieces(batch: Arguments, accumulator: SensitivityAccumulator) -> Iterator[tuple[Arguments, list[int]]]:
    """The samples of a batch that are asked, cut, and their numbers; a batch that cannot be cut whole."""
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
    """Within it gradients are on, and every call of the layers adds (site, response) to `taps`."""

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
    """Within it no parameter asks for a gradient."""
    asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
