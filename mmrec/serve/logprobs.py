"""Log probabilities of tokens, in the shape of OpenAI's ``logprobs``; always of the model's own distribution.

What changes the draw (``temperature``, ``top_p``) does not change them, as in vLLM, so a text has the same log
probabilities whether it was written or is given back by ``echo``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import islice
from typing import Any, NamedTuple, Self

from torch import Tensor

from mmrec.tokenizers import Tokenizer

ROWS = 256
"""Distributions that are computed at a time: bounds the memory that a long prompt takes with many tokens."""


class TokenLogprob(NamedTuple):
    """One token in its place.

    Attributes:
        token: the one that stands there.
        logprob: the natural logarithm of the probability that it was given; None where nothing could predict it.
        best: the same for the likeliest tokens, best first, and for ``token``.
    """

    token: int
    logprob: float | None
    best: dict[int, float]


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> list[TokenLogprob]:
    """Return a row for each of ``tokens`` [n], int64, with its ``count`` likeliest ones, of ``logits`` [n, N]."""
    found = []
    for some, of in zip(logits.split(ROWS), tokens.split(ROWS), strict=True):
        logprobs = some.float().log_softmax(-1)
        own = logprobs.gather(1, of[:, None].to(logprobs.device))[:, 0]
        best = logprobs.topk(min(count, logprobs.shape[1]))
        for token, logprob, ids, values in zip(
            of.tolist(), own.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            found.append(TokenLogprob(token, logprob, dict(zip(ids, values, strict=True)) | {token: logprob}))
    return found


Places = Sequence[tuple[int, TokenLogprob]]
"""Tokens, each with the character of the text at which it begins."""


@dataclass(frozen=True)
class Logprobs:
    """Log probabilities of some tokens: the lists that a response has, each as JSON without its brackets.

    The answer to a long prompt has a million numbers. Made into JSON piece by piece, where the model's work is done,
    they take less memory, and the event loop has only to join them.
    """

    @classmethod
    def of(cls, places: Places, names: list[str], tokenizer: Tokenizer, count: int) -> Self:
        """Return the lists for ``places``.

        Args:
            places: the tokens.
            names: of every token, as :func:`token_names` returns them.
            tokenizer: of the tokens.
            count: of the likeliest tokens that were requested in each place.
        """
        raise NotImplementedError

    @classmethod
    def join(cls, parts: Iterable[Logprobs]) -> str:
        """Return the JSON of ``logprobs`` for parts that follow one another."""
        names = [field.name for field in fields(cls)]
        columns = zip(*(astuple(part) for part in parts), strict=True)
        texts = [", ".join(filter(None, column)) for column in columns] or [""] * len(names)
        lists = (f'"{name}": [{text}]' for name, text in zip(names, texts, strict=True))
        return f"{{{', '.join(lists)}}}"


@dataclass(frozen=True)
class CompletionLogprobs(Logprobs):
    """The four lists of a completion."""

    tokens: str
    token_logprobs: str
    top_logprobs: str
    text_offset: str

    @classmethod
    def of(cls, places: Places, names: list[str], tokenizer: Tokenizer, count: int) -> Self:
        tops: list[dict[str, float] | None] = []
        for _, row in places:
            top: dict[str, float] = {}
            for token, logprob in row.best.items():
                top.setdefault(names[token], logprob)  # where two tokens have one name, the likelier counts
            tops.append(top or None)
        lists: list[list[Any]] = [
            [names[row.token] for _, row in places],
            [row.logprob for _, row in places],
            tops,
            [place for place, _ in places],
        ]
        return cls(*map(_items, lists))


@dataclass(frozen=True)
class ChatLogprobs(Logprobs):
    """The one list of a chat completion."""

    content: str

    @classmethod
    def of(cls, places: Places, names: list[str], tokenizer: Tokenizer, count: int) -> Self:
        def described(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": names[token], "logprob": logprob, "bytes": list(tokenizer.token_bytes(token))}

        return cls(
            _items(
                [
                    described(row.token, row.logprob)
                    | {"top_logprobs": [described(*one) for one in islice(row.best.items(), count)]}
                    for _, row in places
                ]
            )
        )


def _items(values: list[Any]) -> str:
    """Return the items of a list as JSON."""
    return json.dumps(values, allow_nan=False)[1:-1]


def token_names(tokenizer: Tokenizer) -> list[str]:
    r"""Return the text of each token; its bytes, as OpenAI writes them (bytes:\xc3), where that is no whole text."""
    return [_name(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)]


def _name(spelled: bytes) -> str:
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
