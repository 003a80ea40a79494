"""Models that are made and not trained, tokenizers for them, and what a checkpoint holds of one."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmrec.checkpoints.contents import MODEL_KEY, describe_model
from mmrec.checkpoints.loading import LoadedModel
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import BPETokenizer, ByteTokenizer, CharacterTokenizer, Tokenizer

TEXT = "Iğdır'da ılık bir İNCE yağmur 🙂👩‍👩‍👧 e\u0301 <|pad|> the the\r\n\n\n  then\t\u00a0\u2028\ufeff\0 end\n"
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "characters": lambda: CharacterTokenizer(TEXT),
    "bytes": ByteTokenizer,
    "bytes of documents": lambda: ByteTokenizer(documents=True),
    "bpe": lambda: BPETokenizer.train(TEXT * 20, 320),
    "bpe of documents": lambda: BPETokenizer.train(TEXT * 20, 320, documents=True),
}
SHAPE = ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24)


def made(tokenizer: Tokenizer, config: ModelConfig = SHAPE) -> LoadedModel:
    """Return a model whose next token is clear: its weights are large."""
    torch.manual_seed(0)
    net = RecurrentLM(config, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return LoadedModel(net, tokenizer, 5)


SHORT_AND_LONG = ModelConfig(dim=16, layers=2, layer_types=("short", "long"), heads=2, ffn_dim=24)
TOKENIZER = CharacterTokenizer("abc")


def content(net: RecurrentLM, tokenizer: Tokenizer = TOKENIZER) -> dict[str, Any]:
    """Return what a checkpoint of ours holds of a model."""
    weights = {f"net.{name}": value for name, value in net.state_dict().items()}
    return {MODEL_KEY: describe_model(net, tokenizer), "state_dict": weights, "global_step": 7}
