"""What a model takes and gives, and whether a request fits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs, model_outputs
from rsi_deploy.runtime.feeds.user_feeds import check_feeds
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.tensors import NAMES, Array

Feeds = Mapping[str, Array]
Outputs = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Inputs and outputs of a model; a dimension is a number, a symbol (dynamic, named) or None (dynamic).

    Attributes:
        inputs: in the model's order.
        outputs: likewise.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]

    @classmethod
    def of(cls, session: Any, name: str) -> "Signature":
        """The signature of an `onnxruntime.InferenceSession`.

        Raises:
            ModelError: a tensor that the protocol cannot carry here; with its name and type.
        """
        found = cls(inputs=tuple(model_inputs(session, name)), outputs=tuple(model_outputs(session, name)))
        for what, specs in (("input", found.inputs), ("output", found.outputs)):
            for spec in specs:
                if spec.dtype not in NAMES:
                    raise ModelError(
                        f"{name} cannot be served: {what} {spec} is none of {', '.join(NAMES.values())}"
                        f"; export a model with such inputs and outputs"
                    )
        return found

    def check(self, feeds: Feeds, model: str) -> None:
        """Refuse inputs whose names, types or shapes are not the model's.

        Raises:
            Refusal: 400, with what the model takes and what came.
        """
        try:
            check_feeds(self.inputs, feeds, model)
        except UsageError as error:
            raise Refusal(400, str(error)) from None

    def check_outputs(self, names: tuple[str, ...], model: str) -> None:
        """Refuse outputs that the model does not give.

        Raises:
            Refusal: 400, with the names there are.
        """
        given = [spec.name for spec in self.outputs]
        if unknown := [name for name in names if name not in given]:
            raise Refusal(400, f"{model} has no output {', '.join(unknown)[:200]}; it gives {', '.join(given)}")


def rows(feeds: Feeds) -> int:
    """Size of the first axis; 1 where an input has none, or an empty one that is no batch."""
    first = next(iter(feeds.values()))
    return max(len(first), 1) if first.ndim else 1


def metadata(specs: tuple[InputSpec, ...]) -> list[dict[str, Any]]:
    """Names, datatypes and shapes as the protocol writes them, -1 for a dynamic dimension."""
    return [
        {
            "name": spec.name,
            "datatype": NAMES[np.dtype(spec.dtype)],
            "shape": [dim if isinstance(dim, int) else -1 for dim in spec.shape],
        }
        for spec in specs
    ]
