"""A request to generate text, the pieces of its answer, and the search for stop strings in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Finish = Literal["", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """What to generate.

    Attributes:
        prompt: text, or token ids; ignored if there are messages.
        messages: JSON list of chat messages for the folder's chat template, or "".
        max_tokens: most tokens to generate; the model's context may end them earlier.
        temperature: temperature of sampling; 0 takes the most probable token.
        top_p: share of probability that is sampled from.
        top_k: number of tokens that are sampled from; 0 is all.
        seed: random seed; None is another one each time.
        stop: texts that end the answer, which does not include them.
    """

    prompt: str | tuple[int, ...] = ""
    messages: str = ""
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Characters or token ids of the prompt."""
        return len(self.messages or self.prompt)


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A part of an answer, sent after each token.

    Attributes:
        text: text that the token adds; "" while it is incomplete, or may begin a stop string.
        prompt_tokens: tokens of the prompt.
        tokens: tokens generated so far.
        finish: why the answer ends with this piece: "stop" at a token that ends texts or a stop string, "length" at
            the most tokens; "" if it goes on.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish: Finish = ""


@dataclass(kw_only=True, eq=False)
class PendingText:
    """A request on its way through the queue to a worker.

    Attributes:
        request: what to generate.
        on_piece: called with each piece.
        started: whether a piece has been delivered: the answer cannot be started again.
    """

    request: TextRequest
    on_piece: Callable[[TextPiece], None]
    started: bool = False

    def deliver(self, piece: TextPiece) -> None:
        """Pass a piece on."""
        self.started = True
        self.on_piece(piece)


class StopSearch:
    """Text up to the first stop string; what may begin one is held back until it is known.

    >>> search = StopSearch(("END",))
    >>> [search.add(text) for text in ("one E", "N", "two EN", "D three")]
    [('one ', False), ('', False), ('ENtwo ', False), ('', True)]

    Args:
        stops: stop strings, none of them empty.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self.held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain now, and whether a stop string has come."""
        self.held += text
        found = [at for stop in self._stops if (at := self.held.find(stop)) >= 0]
        if found:
            return self.held[: min(found)], True
        longest = max((self._beginning(stop) for stop in self._stops), default=0)
        certain = len(self.held) - longest
        text, self.held = self.held[:certain], self.held[certain:]
        return text, False

    def _beginning(self, stop: str) -> int:
        """Return the most characters at the end of the held text that begin a stop string."""
        lengths = range(min(len(stop) - 1, len(self.held)), 0, -1)
        return next((length for length in lengths if self.held.endswith(stop[:length])), 0)
