"""Text of streamed tokens: whole characters, nothing from a stop on, and the log probabilities of its tokens."""

from __future__ import annotations

from collections import deque

from mmrec.serve.logprobs import Places, TokenLogprob
from mmrec.tokenizers import StreamDecoder, Tokenizer


class StopFinder:
    """Passes a text on as it comes, but nothing from the first of some strings on, nor what may begin one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops, self._held = stops, ""
        self.found = False

    def push(self, text: str) -> str:
        """Return what may be passed on now that ``text`` has come."""
        self._held += text
        places = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:  # the one that was complete first ends the text
            self.found = True
            return self._pass(min(places)[1])
        beginning = (
            size
            for stop in self._stops
            for size in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:size])
        )
        return self._pass(len(self._held) - max(beginning, default=0))

    def flush(self) -> str:
        """Return what was held back, where the text ends."""
        return "" if self.found else self._pass(len(self._held))

    def _pass(self, size: int) -> str:
        passed, self._held = self._held[:size], self._held[size:]
        return passed


class Transcript:
    """Text of tokens, with a row for each, where there are rows.

    Args:
        tokenizer: of the tokens.
        stops: strings before which the text ends.
        begin: characters that stand before the text.
        pending: bytes of a character that had begun before the first token.
        unfinished: rows of tokens of that character which nobody was given yet.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: list[str],
        begin: int = 0,
        pending: bytes = b"",
        unfinished: Places = (),
    ) -> None:
        self._tokenizer, self._decoder, self._stops = tokenizer, StreamDecoder(tokenizer, pending), StopFinder(stops)
        self._decoded = self._passed = begin
        self._held = deque(unfinished)
        self._keeps_pending = False

    @property
    def stopped(self) -> bool:
        """Whether a stop was found; no more tokens are needed then."""
        return self._stops.found

    def push(self, token: int, row: TokenLogprob | None) -> str:
        """Return what may be passed on now that ``token`` has come."""
        if row is not None:
            self._held.append((self._decoded + self._follows_half_a_character(token), row))
        text = self._decoder.push(token)
        self._decoded += len(text)
        return self._pass(self._stops.push(text))

    def end(self, keep_pending: bool = False) -> str:
        """Return what was held back, where the tokens end.

        A character whose bytes are not all there becomes U+FFFD, or is kept back where a later text completes it.
        """
        if self.stopped:
            return ""
        self._keeps_pending = keep_pending
        rest = "" if keep_pending else self._stops.push(self._decoder.flush())
        return self._pass(rest + self._stops.flush())

    def rows(self) -> list[tuple[int, TokenLogprob]]:
        """Return what is new: the rows whose tokens begin in what was passed on, and where each begins.

        At the end, those of a character that was kept back are new, too: the text that completes it has none of them.
        """
        new = []
        while self._held and (self._held[0][0] < self._passed or self._keeps_pending):
            new.append(self._held.popleft())
        return new

    def held(self) -> Places:
        """Return the rows of a character that has begun, which were not given yet."""
        return tuple(self._held)

    def _follows_half_a_character(self, token: int) -> bool:
        """Whether what stood before was no character after all: it will be a U+FFFD before ``token``."""
        return self._decoder.inside and self._tokenizer.token_bytes(token)[0] & 0xC0 != 0x80

    def _pass(self, text: str) -> str:
        self._passed += len(text)
        return text
