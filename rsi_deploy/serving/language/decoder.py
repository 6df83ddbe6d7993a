"""A decoder in a worker's memory: onnxruntime-genai generates one sequence at a time.

prompt or messages --genai's tokenizer, chat template--> token ids --genai--> a token --> its text --> a piece
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.runtime.genai import PACKAGE, GenaiFolder, genai_library, genai_version
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name
from rsi_deploy.serving.bundles import Bundle, stamps
from rsi_deploy.serving.language.generation import StopSearch, TextPiece, TextRequest
from rsi_deploy.serving.protocol.signature import Signature

Tokens = npt.NDArray[np.int32]


class Decoder:
    """A loaded model of onnxruntime-genai.

    Args:
        bundle: its folder.
        provider: execution provider, which must be the one that the folder names.
        threads: threads inside one operator.

    Attributes:
        signature: no inputs and outputs: texts go in and come out.
        alone: why requests are not joined.

    Raises:
        UsageError: onnxruntime-genai is not installed.
        ModelError: it does not read the model or its tokenizer, or the provider is another one than the folder's.
        GateError: the files have changed since they were checked.
    """

    signature = Signature(inputs=(), outputs=())
    alone = "a worker generates one sequence at a time"

    def __init__(self, bundle: Bundle, provider: str = "cpu", *, threads: int = 1):
        self._name, self._genai = str(bundle.path), genai_library()
        self._folder = folder = GenaiFolder.read(self._name)
        if short_name(parse_provider(provider).name) != (made_for := short_name(folder.provider)):
            raise ModelError(
                f"{self._name} is made for {made_for}, but --provider is {provider}",
                hint=f"type --provider {made_for}, or make the folder for the other one",
            )
        self._model = folder.load(threads, spin_between_runs=False)
        try:
            self._tokenizer = self._genai.Tokenizer(self._model)
        except Exception as error:  # of a library in C++, without a type of its own
            raise ModelError(
                f"{self._name}: {PACKAGE} {genai_version()} does not read the tokenizer: {error}",
                hint="make the folder again with this version",
            ) from error
        self._ends = frozenset(int(token) for token in self._tokenizer.eos_token_ids)
        if stamps(bundle.path) != bundle.stamps:
            raise GateError(f"{bundle.path} has been replaced since it was checked; start again when it is complete")

    def generate(self, request: TextRequest) -> Iterator[TextPiece]:
        """Yield a piece after each token; the last one has a reason why the answer ends.

        Raises:
            ModelError: the prompt is empty, too long or of other tokens, there is no chat template, or genai fails.
        """
        prompt = self._prompt(request)
        most = request.max_tokens
        if self._folder.longest is not None:
            most = min(most, self._folder.longest - len(prompt))
        if most < 1:
            raise ModelError(
                f"the prompt has {len(prompt):,} tokens, but prompt and answer have at most {self._folder.longest:,}",
                hint="send a shorter prompt",
            )
        try:
            yield from self._pieces(request, prompt, most)
        except RuntimeError as error:  # of genai
            raise ModelError(
                f"{PACKAGE} fails while it generates: {error}", hint="send a shorter prompt, or make the folder again"
            ) from error

    def _pieces(self, request: TextRequest, prompt: Tokens, most: int) -> Iterator[TextPiece]:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=len(prompt) + most, num_beams=1, num_return_sequences=1, **_sampling(request)
        )
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(prompt)
        stream, search = self._tokenizer.create_stream(), StopSearch(request.stop)
        for count in range(1, most + 1):
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            is_end = token in self._ends
            text, is_stopped = search.add("" if is_end else stream.decode(token))
            is_last = is_end or count == most
            if is_last and not is_stopped:
                text += search.held
            finish: Any = "stop" if is_end or is_stopped else "length" if is_last else ""
            yield TextPiece(text=text, prompt_tokens=len(prompt), tokens=count, finish=finish)
            if finish:
                return

    def _prompt(self, request: TextRequest) -> Tokens:
        """Return the token ids `(tokens,)` of the prompt."""
        prompt = request.prompt
        if request.messages:
            try:
                prompt = self._tokenizer.apply_chat_template(request.messages, add_generation_prompt=True)
            except Exception as error:  # of a library in C++, without a type of its own
                raise ModelError(
                    f"the chat template of {self._name} does not take the messages: {error}",
                    hint="send other messages, or a prompt to /v1/completions",
                ) from error
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = np.asarray(ids, np.int64)
        if not len(tokens):
            raise ModelError("the model cannot continue an empty prompt", hint="send at least one token")
        if tokens.min() < 0 or tokens.max() >= self._folder.vocabulary:
            raise ModelError(
                f"the prompt has the token ids {tokens.min()} to {tokens.max()}, but the model knows 0 to "
                f"{self._folder.vocabulary - 1}",
                hint="send tokens of this model",
            )
        return tokens.astype(np.int32)


def _sampling(request: TextRequest) -> dict[str, Any]:
    """Return the search options of genai."""
    if request.temperature == 0:
        return {"do_sample": False}
    seed = {} if request.seed is None else {"random_seed": request.seed % 2**31}
    return {
        "do_sample": True,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        **seed,
    }
