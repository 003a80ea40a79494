"""A model as one safetensors file: weights, config and tokenizer, without the state of training.

In a folder for transformers the weights stand in the file that the library writes, and the rest in one beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.checkpoints.checksummed import FileFormat, read_checksummed, write_checksummed
from mmrec.checkpoints.hub import DESCRIPTION, EXPORTED
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
    described = _described(net, tokenizer, chat)
    metadata = {name: json.dumps(value) for name, value in described.items()} | {"step": str(step)}
    write_checksummed(path, FORMAT, weights, metadata)


def _described(net: RecurrentLM, tokenizer: Tokenizer, chat: ChatTemplate | None) -> dict[str, Any]:
    described = {"shape": net.config.as_dict(), "tokenizer": tokenizer.state()}
    return described | ({} if chat is None else {"chat": asdict(chat)})


def describe_exported(
    folder: Path, net: RecurrentLM, tokenizer: Tokenizer, step: int, chat: ChatTemplate | None = None
) -> None:
    """Write what makes a model of the weights in a folder for transformers, with their sha256, beside them.

    :func:`read_weights` then reads the folder's weights as it does a file of :func:`save_weights`.
    """
    described = {"format": FORMAT.format, "version": FORMAT.version, "step": step}
    described |= {"sha256": _sha256(folder / EXPORTED)} | _described(net, tokenizer, chat)
    (folder / DESCRIPTION).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """Return what describes the model, as in a checkpoint, all weights by name, and the step.

    Args:
        path: a file of :func:`save_weights`, or the weights in a folder for transformers.

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    if path.with_name(DESCRIPTION).is_file():
        return _read_exported(path)
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


def _read_exported(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    """:func:`read_weights` of a folder for transformers, in which the names of the weights begin with ``net.``."""
    beside = path.with_name(DESCRIPTION)
    try:
        described: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        if (described["format"], described["version"]) != (FORMAT.format, FORMAT.version):
            raise UserError(f"{beside}: is of version {described['version']}; this program reads {FORMAT.version}")
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if described["sha256"] != _sha256(path):
            raise UserError(f"{path}: is damaged, or not the weights that {DESCRIPTION} is of; {FORMAT.remedy}")
        weights = {name.removeprefix("net."): weight for name, weight in load_file(path).items()}
        if described["shape"].get("tie_embeddings"):
            weights.setdefault("head.weight", weights["embedding.weight"])
        description = {key: described[key] for key in ("shape", "tokenizer")}
        description |= {"chat": described["chat"]} if "chat" in described else {}
        return description, weights, int(described["step"])
    except (LookupError, TypeError, ValueError, AttributeError, SafetensorError):
        raise UserError(f"{beside}: does not describe a model; {FORMAT.remedy}") from None
