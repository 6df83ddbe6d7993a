"""The options of `rsi-deploy bench` that say what is measured."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def matrix_options(function: F) -> F:
    """The configurations, and the time for them."""
    for decorator in (
        click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of all that is random."),
        click.option("--pin", metavar="0,1", help="Run on these cores only, workers too."),
        click.option(
            "--dtype",
            "precisions",
            default="stored",
            show_default=True,
            metavar="stored,float16",
            help="The files as they are, and converted to float16.",
        ),
        click.option("--threads", metavar="1,2", help="onnxruntime threads; default: its own choice."),
        click.option("--feeds", type=click.Path(), help="An .npz with one array per input, in place of random inputs."),
        click.option(
            "--input-shape",
            "shapes",
            multiple=True,
            metavar="NAME=1x128[,1x256]",
            help="Shapes of one input (N for the batch); repeatable.",
        ),
        click.option("--batch", default="1", show_default=True, metavar="1,8", help="Samples a call."),
        click.option("--precision", default="2%", show_default=True, help="Intervals so narrow (+-) end it early."),
        click.option("--budget", metavar="60s", help="Time in all, spent where the intervals are widest."),
        click.option(
            "--seconds",
            default=10.0,
            show_default=True,
            type=click.FloatRange(min=0, min_open=True),
            help="At most, for each configuration and each measurement below.",
        ),
    ):
        function = decorator(function)
    return function


def measurement_options(function: F) -> F:
    """Besides the latency of a call: each a measurement of its own, in the first configuration."""
    for decorator in (
        click.option("--profile", is_flag=True, help="Time per op type and per split site."),
        click.option("--throughput", is_flag=True, help="Samples a second at growing batches."),
        click.option("--streams", metavar="1,2,4", help="Threads that share one session: throughput and latency."),
        click.option("--bursts", metavar="200ms", help="Bursts of calls after idle gaps of this length."),
        click.option("--memory-limit", metavar="512MB", help="Ceiling on resident memory: does each model fit?"),
        click.option("--memory", is_flag=True, help="Resident memory, in a process of its own."),
        click.option("--cold-start", is_flag=True, help="Process start, import, load, first inference."),
    ):
        function = decorator(function)
    return function
