"""Greedy generation with a decoder that takes caches: the prompt in one run, then the likeliest token, one a run."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Array
from rsi_deploy.runtime.feeds.caches import Caches
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.sessions import run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Tokens = npt.NDArray[np.int64]


def greedy_tokens(session: "InferenceSession", prompts: Tokens, steps: int, name: str = "the model") -> Tokens:
    """Return the tokens that follow each prompt, the likeliest one at every step; no token ends a text.

    Args:
        session: session of the decoder, all outputs of which are numbers.
        prompts: token ids of prompts of equal length, `(n, tokens)`.
        steps: number of tokens to generate.
        name: model name for messages.

    Returns:
        Token ids int64, `(n, steps)`.

    Raises:
        ModelError: The model takes no caches of a known layout, or a run fails.
    """
    specs, names = model_inputs(session, name), [output.name for output in session.get_outputs()]
    caches = Caches.of(specs)
    presents = None if caches is None else caches.presents(names)
    scores = [each for each in names if each not in (presents or {}).values()]
    if caches is None or presents is None or not scores:
        raise ModelError(
            f"{name} does not generate: it takes {', '.join(spec.name for spec in specs[:4])}, ... and returns "
            f"{', '.join(names[:4])}, ...",
            hint="give a decoder with input_ids, and past_key_values.N.key -> present.N.key (and .value)",
        )
    found: list[Tokens] = []
    feeds = caches.prefill(prompts)
    for step in range(steps):
        outputs: dict[str, Value] = dict(zip(names, run_session(session, feeds, name), strict=True))
        last: Array = outputs[scores[0]][:, -1]
        found.append(np.argmax(last, axis=-1)[:, None].astype(np.int64))
        if step < steps - 1:
            feeds = caches.decode(feeds, outputs, found[-1])
    return np.concatenate(found, axis=1) if found else np.empty((len(prompts), 0), np.int64)
