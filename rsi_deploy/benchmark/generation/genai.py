"""One timed generation of a model of onnxruntime-genai."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Floats
from rsi_deploy.runtime.genai import PACKAGE, GenaiFolder, genai_library, genai_version

Prompt = npt.NDArray[np.int32]


class GenaiModel:
    """A loaded model.

    Args:
        path: its folder.
        model: its `onnxruntime_genai.Model`.
    """

    def __init__(self, path: Path, model: Any):
        self._path, self._genai, self._model = path, genai_library(), model

    @classmethod
    def load(cls, folder: GenaiFolder, threads: int | None) -> "GenaiModel":
        """Load the model of a folder; see `GenaiFolder.load`."""
        return cls(folder.path, folder.load(threads))

    def generate(self, prompt: Prompt, count: int) -> Floats:
        """Generate tokens greedily, past tokens that end a text.

        Args:
            prompt: token ids, int32 `(tokens,)`.
            count: number of tokens to generate, 1 or more.

        Returns:
            Milliseconds of each token, float64 `(count,)`: the first with the prompt's, the others without.

        Raises:
            ModelError: onnxruntime-genai fails, or ends early.
        """
        length = len(prompt) + count
        try:
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(max_length=length, min_length=length, do_sample=False, num_beams=1)
            generator = self._genai.Generator(self._model, parameters)

            def first() -> None:
                generator.append_tokens(prompt)
                generator.generate_next_token()

            times = [time_calls(first, 1), time_calls(generator.generate_next_token, count - 1)]
            reached = len(generator.get_sequence(0))
        except Exception as error:  # of a library in C++, without a type of its own
            raise ModelError(
                f"{self._path}: {PACKAGE} {genai_version()} fails while it generates: {error}",
                hint="try a shorter --prompt and --generate, or the version of onnxruntime-genai that made the folder",
            ) from error
        if reached != length:
            raise ModelError(
                f"{self._path}: the text ends after {reached} of {length} tokens",
                hint="type a smaller --generate",
            )
        return np.concatenate(times) / 1e6
