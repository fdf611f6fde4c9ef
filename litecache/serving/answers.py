"""One answer as it grows: tokens become text that nothing later takes back.

What is given out never ends within a character, and never holds the beginning of a stop string that
the next token may complete.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from litecache.adapter.streaming import TextDecoder
from litecache.types import TokenLogprobs


@dataclass
class Piece:
    """What a few tokens added to an answer.

    Attributes:
        text: that is settled now.
        tokens, logprobs: whose text begins in what is settled now.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, other: Piece) -> None:
        """What follows it."""
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs


class StopFinder:
    """Looks for the first of some texts in one that comes piece by piece."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What of the text so far is settled, and whether a stop string is complete.

        Of several the one that is complete first counts, so that it makes no difference in which
        pieces the text comes. What follows the stop string, and itself, is never given out.
        """
        held = self._held + text
        ends = ((held.find(stop), stop) for stop in self._stops)
        found = [(at + len(stop), at) for at, stop in ends if at >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        keep = max((overlap(held, stop) for stop in self._stops), default=0)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut], False

    def rest(self) -> str:
        """What was held back, when no more follows."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """How much of the end of a text is the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """The text of one row.

    Args:
        decoder: of the tokenizer.
        stops: texts that end it.
        silent: tokens that are no part of the text: those that end it.

    Attributes:
        num_tokens: of the answer; those after a stop string are not counted.
        num_characters: given out.
        stopped: a stop string was complete.
    """

    def __init__(
        self, decoder: TextDecoder, stops: Sequence[str] = (), silent: Collection[int] = ()
    ) -> None:
        self._decoder, self._silent = decoder, silent
        self._finder = StopFinder(stops) if stops else None
        self.num_tokens = self.num_characters = 0
        self.stopped = False
        # tokens whose text may still be part of a stop string, with where it begins
        self._open: list[tuple[int, int, TokenLogprobs | None]] = []
        self._decoded = 0

    def add(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), *, last: bool = False
    ) -> Piece:
        """Take the next tokens.

        Args:
            tokens: new ones; nothing is taken any more after a stop string.
            logprobs: of each, or none at all.
            last: no more follow.
        """
        if self.stopped:
            return Piece()
        if self._finder is None:
            self.num_tokens += len(tokens)
            text = self._decoder.add([t for t in tokens if t not in self._silent], last=last)
            self.num_characters += len(text)
            return Piece(text, list(tokens), list(logprobs))
        piece = Piece()
        for index, token in enumerate(tokens):
            self._open.append((self._decoded, token, logprobs[index] if logprobs else None))
            self.num_tokens += 1
            spoken = [] if token in self._silent else [token]
            self._settle(self._decoder.add(spoken), piece)
            if self.stopped:
                break
        if last and not self.stopped:
            self._settle(self._decoder.add([], last=True), piece)
            if not self.stopped:
                rest = self._finder.rest()
                piece.text += rest
                self.num_characters += len(rest)
                self._give_out(piece, self._decoded + 1)
        return piece

    def _settle(self, text: str, piece: Piece) -> None:
        assert self._finder is not None
        self._decoded += len(text)
        settled, self.stopped = self._finder.add(text)
        piece.text += settled
        self.num_characters += len(settled)
        # a token without text, behind all that is settled, waits for what follows
        self._give_out(piece, self.num_characters)
        if self.stopped:
            self._open.clear()

    def _give_out(self, piece: Piece, end: int) -> None:
        while self._open and self._open[0][0] < end:
            _, token, logprob = self._open.pop(0)
            piece.tokens.append(token)
            if logprob is not None:
                piece.logprobs.append(logprob)
