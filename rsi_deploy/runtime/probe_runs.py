"""Runs on probe inputs: one run, and for a decoder with caches the step after it.

prefill    the probe inputs
decode     the last tokens of the probe inputs once more, with the model's own caches of the first run
"""

from typing import TYPE_CHECKING

import numpy as np

from rsi_deploy.core.types import Feeds
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def run_probe(session: "InferenceSession", feeds: Feeds, name: str) -> list[Value]:
    """Run a session on probe inputs and return its outputs; those of a decode step follow.

    Args:
        session: session of the model.
        feeds: input name -> array.
        name: model name for messages.

    Raises:
        ModelError: As `run_session`.
    """
    outputs = run_session(session, feeds, name)
    return [*outputs, *decode_step(session, feeds, outputs, name)]


def probe_names(session: "InferenceSession", values: list[Value]) -> list[str]:
    """Return the names of the values of `run_probe`."""
    names = [output.name for output in session.get_outputs()]
    return names if len(values) == len(names) else [*names, *(f"{name} (decode)" for name in names)]


def decode_step(session: "InferenceSession", feeds: Feeds, outputs: list[Value], name: str) -> list[Value]:
    """Decode one token after a run; empty for a model that takes no caches, or no single token.

    Args:
        session: session of the model.
        feeds: feeds of the run.
        outputs: outputs of the run, in order.
        name: model name for messages.

    Raises:
        ModelError: As `run_session`.
    """
    specs = model_inputs(session, name)
    caches, names = Caches.of(specs), [output.name for output in session.get_outputs()]
    if caches is None or caches.presents(names) is None:
        return []
    following = caches.decode(feeds, dict(zip(names, outputs, strict=True)), np.asarray(feeds[caches.ids.name])[:, -1:])
    if not all(spec.accepts(following[spec.name].dtype, following[spec.name].shape) for spec in specs):
        return []
    return run_session(session, following, name)
