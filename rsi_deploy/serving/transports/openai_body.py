"""Bodies of requests in OpenAI's form: /v1/completions, /v1/chat/completions and /v1/embeddings.

A field that this server does not have is accepted if its value asks for nothing (`"n": 1`, `"echo": false`, null), and
refused by its name otherwise.
"""

import abc
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
import pydantic

from rsi_deploy.serving.language.generation import TextRequest
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.tensors import short_repr
from rsi_deploy.serving.transports.http_body import json_object

MAX_TEXTS = 2048
"""Most texts of a request for embeddings."""
DEFAULT_TOKENS = 16
"""Tokens that /v1/completions generates where the request does not say."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Field that is not supported -> values that ask for nothing."""
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
"""Fields that change no answer."""

Count = Annotated[int, pydantic.Field(ge=1)]
StopText = Annotated[str, pydantic.Field(min_length=1, max_length=256)]
Body = TypeVar("Body", bound="_Body")


class _Body(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    model: str

    @property
    def name_and_version(self) -> tuple[str, str]:
        """Name and version of the model, which is `NAME` or `NAME:VERSION`."""
        name, _, version = self.model.partition(":")
        return name, version


class StreamOptions(pydantic.BaseModel, extra="forbid", strict=True, frozen=True):
    """Options of a streamed answer: whether it ends with the numbers of tokens."""

    include_usage: bool = False


class GenerationBody(_Body):
    """What requests to generate text have in common."""

    max_tokens: Count | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, pydantic.Field(ge=0, lt=1 << 31)] | None = None
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], pydantic.Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @abc.abstractmethod
    def request(self, *, most: int) -> TextRequest:
        """Return what to generate, at most `most` tokens.

        Raises:
            Refusal: 400, with what is wrong.
        """

    def _request(self, most: int, default: int, **prompt: Any) -> TextRequest:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return TextRequest(
            max_tokens=min(self.max_tokens or default, most),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p or 1.0,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=tuple(stop),
            **prompt,
        )


class CompletionBody(GenerationBody):
    """A request to continue a text."""

    prompt: Any

    def request(self, *, most: int) -> TextRequest:
        """Return what to generate; see `GenerationBody`."""
        return self._request(most, DEFAULT_TOKENS, prompt=_prompt(self.prompt))


class ChatBody(GenerationBody):
    """A request to answer messages."""

    messages: Any
    max_completion_tokens: Count | None = None

    def request(self, *, most: int) -> TextRequest:
        """Return what to generate; see `GenerationBody`."""
        return self._request(most, self.max_completion_tokens or most, messages=_messages(self.messages))


class EmbeddingsBody(_Body):
    """A request for embeddings."""

    input: Any
    encoding_format: Literal["float", "base64"] | None = None

    @property
    def texts(self) -> list[str]:
        """The texts.

        Raises:
            Refusal: 400, there is none, or it is no text.
        """
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, f"input must be a text or a list of texts, but got {short_repr(self.input)}")
        if len(texts) > MAX_TEXTS:
            raise Refusal(400, f"input has {len(texts)} texts; send at most {MAX_TEXTS} at a time")
        return texts


def decode(kind: type[Body], body: bytes, *, max_json: int) -> Body:
    """Return the request in a body.

    Args:
        kind: what to expect.
        body: the whole body.
        max_json: most bytes.

    Raises:
        Refusal: 400, with the field that is wrong; 413, the body is too long.
    """
    if len(body) > max_json:
        raise Refusal(413, f"{len(body)} bytes of JSON are more than {max_json}, the most that a request may have")
    document = json_object(body)
    try:
        return kind.model_validate(_supported(document))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise Refusal(400, f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}") from None


def _supported(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this server has.

    Raises:
        Refusal: 400, a field is not supported.
    """
    for name, neutral in _NEUTRAL.items():
        value = document.get(name)
        if value is not None and value not in neutral:
            raise Refusal(400, f"{name} = {short_repr(value)} is not supported; leave it out")
    return {name: value for name, value in document.items() if name not in _NEUTRAL and name not in _IGNORED}


def _prompt(value: Any) -> str | tuple[int, ...]:
    """Return a prompt, which may be the only one in a list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return _text(value, "prompt")
    if isinstance(value, list) and all(type(token) is int and 0 <= token < 1 << 31 for token in value):
        return tuple(value)
    if isinstance(value, list) and all(isinstance(one, str | list) for one in value):
        raise Refusal(400, f"prompt has {len(value)} prompts, but one sequence is generated at a time; send one each")
    raise Refusal(400, f"prompt must be a text or a list of token ids, but got {short_repr(value)}")


def _messages(value: Any) -> str:
    """Return messages as JSON, each with its role and its text."""
    if not isinstance(value, list) or not value:
        raise Refusal(400, f"messages must be a list of messages, but got {short_repr(value)}")
    return orjson.dumps([_message(message) for message in value]).decode()


def _message(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or value.get("role") not in ("system", "developer", "user", "assistant"):
        raise Refusal(400, f"a message has a role (system, developer, user, assistant), but got {short_repr(value)}")
    content = value.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part.get("text") if isinstance(part.get("text"), str) else "\0" for part in content)
    if not isinstance(content, str):
        raise Refusal(400, f"the content of a message must be text, but got {short_repr(content)}")
    if value.get("tool_calls"):
        raise Refusal(400, "tool_calls of a message are not supported; leave them out")
    return {"role": value["role"], "content": _text(content, "the content of a message")}


def _text(value: str, what: str) -> str:
    """Return a text without the character that onnxruntime-genai would end it at."""
    if "\0" in value:
        raise Refusal(400, f"{what} holds a NUL character or no text; send text")
    return value
