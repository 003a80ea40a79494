"""How well each token of a text was predicted, as a table in a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmrec.core.files import staged_text
from mmrec.tokenizers import Tokenizer


def write_predictions(path: Path, parts: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> int:
    """Write a line for each token: position, token, its text, and its negative log-likelihood in nats.

    Args:
        path: the file; its folder is made.
        parts: "tokens" and "nats" of consecutive parts of a text, each [M].
        tokenizer: of the tokens.

    Returns:
        The number of tokens.
    """
    with staged_text(path, parents=True) as file:
        file.write("position\ttoken\ttext\tnll\n")
        position = 1  # the first token has nothing before it that could predict it
        for part in parts:
            for token, nll in zip(part["tokens"].tolist(), part["nats"].tolist(), strict=True):
                file.write(f"{position}\t{token}\t{tokenizer.decode([token])!r}\t{nll:.5f}\n")
                position += 1
    return position - 1
