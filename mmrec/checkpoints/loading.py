"""Loading a model from a checkpoint or a safetensors file: all that inference needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY, described_chat, model_weights
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.core.devices import find_device
from mmrec.core.errors import UserError, one_line
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, the number of updates that it was trained for, and its chat template, if any."""

    net: RecurrentLM
    tokenizer: Tokenizer
    step: int
    chat: ChatTemplate | None = None


def load_model(path: Path) -> LoadedModel:
    """Return the model of the checkpoint or the safetensors file at ``path``, in evaluation mode on the CPU.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = find_intact_checkpoint(path)
    checkpoint = read_checkpoint(path, verify=False)  # it has been, just now
    try:
        description = checkpoint[MODEL_KEY]
        tokenizer = load_tokenizer(description["tokenizer"])
        net = _model(ModelConfig.from_dict(description["shape"]), tokenizer.vocab_size, model_weights(checkpoint))
        return LoadedModel(net.eval(), tokenizer, int(checkpoint["global_step"]), described_chat(description))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, UserError) as error:
        raise UserError(f"{path}: holds no model that can be used ({one_line(error)[:200]})") from error


def load_chosen(checkpoint: CheckpointOptions) -> LoadedModel:
    """Return the model of ``checkpoint`` on its device; UserError where there is no such checkpoint or device."""
    device = find_device(checkpoint.device)
    trained = load_model(checkpoint.path())
    trained.net.to(device)
    return trained


ELEMENTWISE = {"exp", "expm1", "log", "div", "__rdiv__", "__truediv__", "mul_"}
"""What the initial weights of our layers are computed with."""


class _ShapesAlone(TorchFunctionMode):
    """Leaves out how initial weights are computed, for a model on the device "meta", where they have only a shape.

    Working that out torch would import its compiler, which takes longer than all else that loading a model does.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.linspace:
            return torch.empty(args[2])
        if getattr(func, "__module__", None) == nn.init.__name__ or func.__name__ in ELEMENTWISE:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _model(config: ModelConfig, vocab_size: int, weights: dict[str, Any]) -> RecurrentLM:
    """Return a model with ``weights``, which needs no more memory than they do, whatever the config says."""
    if config.layers > len(weights):
        raise ValueError(f"{config.layers} layers, {len(weights)} weights")
    with torch.device("meta"), _ShapesAlone():
        net = RecurrentLM(config, vocab_size)
    net.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    net.tie()
    return net
