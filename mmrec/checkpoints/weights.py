"""A model as one safetensors file: weights, config and tokenizer, without the state of training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.checkpoints.checksummed import FileFormat, read_checksummed, write_checksummed
from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM
from mmrec.tokenizers import Tokenizer

SUFFIX = ".safetensors"
FORMAT = FileFormat("mmrec-model", "1", "model file", "export it again")


def save_weights(
    path: Path, net: RecurrentLM, tokenizer: Tokenizer, step: int, chat: ChatTemplate | None = None
) -> None:
    """Write a model of ``step`` updates; a tied output layer is the embedding, and stands there once."""
    weights = {name: weight.detach().contiguous() for name, weight in net.state_dict().items()}
    if net.config.tie_embeddings:
        del weights["head.weight"]
    described = {"shape": net.config.as_dict(), "tokenizer": tokenizer.state()}
    described |= {} if chat is None else {"chat": asdict(chat)}
    metadata = {name: json.dumps(value) for name, value in described.items()} | {"step": str(step)}
    write_checksummed(path, FORMAT, weights, metadata)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Return what describes the model, as in a checkpoint, all weights by name, and the step.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    weights, metadata = read_checksummed(path, FORMAT)
    try:
        description = {key: json.loads(metadata[key]) for key in ("shape", "tokenizer")}
        if "chat" in metadata:
            description["chat"] = json.loads(metadata["chat"])
        step = int(metadata["step"])
        if description["shape"].get("tie_embeddings"):
            weights["head.weight"] = weights["embedding.weight"]
    except (LookupError, ValueError, AttributeError):
        raise UserError(f"{path}: does not describe its model; {FORMAT.remedy}") from None
    return description, weights, step
