"""The model as one of the library ``transformers``: its state is what ``generate`` keeps as a cache.

What is exported imports these classes: there is one implementation, and it needs mmrec to be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from mmrec.export.tokenizer import fast_tokenizer
from mmrec.model import ModelConfig, RecurrentLM, State, reset_state_rows
from mmrec.tokenizers import Tokenizer

READ_CHUNK = 2048
"""Tokens that are read at a time: bounds the memory that a long prompt takes."""
PAD = "<|pad|>"
MODELLING = "modeling_mmrec"
MODELLING_FILE = '''\
"""A model of mmrec, which has to be installed: its classes are there."""

from mmrec.export.hf import MmrecConfig, MmrecForCausalLM

__all__ = ["MmrecConfig", "MmrecForCausalLM"]
'''


class MmrecConfig(PreTrainedConfig):
    """What fixes the architecture.

    Args:
        vocab_size: number of different tokens, N.
        shape: what :meth:`mmrec.model.ModelConfig.as_dict` returns; the defaults of its fields if left out.
        kwargs: of every config of the library.
    """

    model_type = "mmrec"

    def __init__(self, vocab_size: int = 256, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        known = ModelConfig.from_dict(shape or {})
        self.vocab_size, self.shape = vocab_size, known.as_dict()
        self.use_cache = kwargs.pop("use_cache", True)
        own = {
            "tie_word_embeddings": known.tie_embeddings,
            "auto_map": {
                "AutoConfig": f"{MODELLING}.{MmrecConfig.__name__}",
                "AutoModelForCausalLM": f"{MODELLING}.{MmrecForCausalLM.__name__}",
            },
        }
        super().__init__(**kwargs | own)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Leave the ``auto_map`` as it is: the library would have this file copied into each saved folder."""


class StateCache:
    """What was read, in the place of the library's cache of keys and values; its size is constant.

    Attributes:
        state: of B texts, as :meth:`~mmrec.model.RecurrentLM.forward` returns it.
        length: tokens that were read, padding too.
    """

    is_compileable = False

    def __init__(self, state: State) -> None:
        self.state, self.length = state, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens of the input are in the state."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on from the rows ``beam_idx`` [B], as beam search asks for."""
        self.state = [(past[beam_idx], memory[beam_idx]) for past, memory in self.state]


class MmrecForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`mmrec.model.RecurrentLM`, as the library calls a model."""

    config_class = MmrecConfig
    _tied_weights_keys = {"net.head.weight": "net.embedding.weight"}  # noqa: RUF012 -- the library's own form
    _is_stateful = True

    def __init__(self, config: MmrecConfig) -> None:
        super().__init__(config)
        self.net = RecurrentLM(ModelConfig.from_dict(config.shape), config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the model has initialized itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """As for the config."""

    def get_input_embeddings(self) -> nn.Module:
        return self.net.embedding

    def set_input_embeddings(self, value: Any) -> None:
        self.net.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.net.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.net.head = new_embeddings

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the library does, with the file that it loads the classes from."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{MODELLING}.py").write_text(MODELLING_FILE, encoding="utf-8")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens and predict, after each, the next one.

        Padding, wherever it stands, leaves the state as it is.

        Args:
            input_ids: [B, T].
            attention_mask: [B, at least T], 0 for padding; the last T columns count. The padding token is padding
                also without it.
            past_key_values: what was read before; it is changed.
            labels: [B, T], as ``input_ids``, with -100 for tokens that are not scored.
            use_cache: return the state; as the config says if left out.
            logits_to_keep: return only so many last logits, or those of these positions; 0 returns all.
            return_dict: False returns a tuple.
            kwargs: of the loss.

        Returns:
            The mean loss in nats, the logits [B, T, N], and the state as ``past_key_values``, those that there are.
        """
        length = input_ids.shape[1]
        pad = self.generation_config.pad_token_id
        real = torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
                raise ValueError(f"attention_mask is {list(attention_mask.shape)}; it must be [B, at least {length}]")
            real = real & attention_mask[:, -length:].bool()
        first_call = past_key_values is None
        # In float32 whatever the weights are: small steps would be lost in less.
        cache = past_key_values or StateCache(self.net.zero_state(len(input_ids), dtype=torch.float32))
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        if bool(real.all()):
            logits, cache.state = self._read(input_ids, cache.state, keep)
        elif first_call:
            logits, cache.state = self._read_padded(input_ids, cache.state, real)
        else:
            logits, cache.state = self._read_on_padded(input_ids, cache.state, real)
        cache.length += length
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        cached: Any = cache if (self.config.use_cache if use_cache is None else use_cache) else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cached)
        return output.to_tuple() if return_dict is False else output

    def _read(self, tokens: Tensor, state: State, keep: int) -> tuple[Tensor, State]:
        kept = []
        for part in tokens.split(READ_CHUNK, dim=1):
            logits, state = self.net(part, state)
            kept.append(logits[:, -keep:])
        return torch.cat(kept, dim=1), state

    def _read_padded(self, tokens: Tensor, state: State, real: Tensor) -> tuple[Tensor, State]:
        """Read rows from their beginning: padding is put before each, and forgotten at its first real token.

        What follows padding is what follows the last real token before it.
        """
        order = real.int().argsort(dim=1, stable=True)
        first = (~real).sum(1, keepdim=True)
        reset_mask = torch.arange(tokens.shape[1], device=tokens.device) == first
        logits, state = self.net(tokens.masked_fill(~real, 0).gather(1, order), state, reset_mask)
        places = (first + real.cumsum(1) - 1).clamp(0, tokens.shape[1] - 1)
        return logits.gather(1, places.unsqueeze(-1).expand_as(logits)), reset_state_rows(state, ~real.any(1))

    def _read_on_padded(self, tokens: Tensor, state: State, real: Tensor) -> tuple[Tensor, State]:
        """Read rows on, token by token; a row keeps its state where it has padding."""
        read: list[Tensor] = []
        for token, there in zip(tokens.masked_fill(~real, 0).split(1, dim=1), real.unbind(1), strict=True):
            logits, after = self.net(token, state)
            read.append(_chosen(there, logits, read[-1]) if read else logits)
            state = [(_chosen(there, *pasts), _chosen(there, *memories)) for pasts, memories in _pairs(after, state)]
        return torch.cat(read, dim=1), state


def _pairs(one: State, other: State) -> list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    return [((a[0], b[0]), (a[1], b[1])) for a, b in zip(one, other, strict=True)]


def _chosen(there: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``new`` where ``there`` [B] is true, and those of ``old`` elsewhere."""
    return torch.where(there.view(-1, *[1] * (new.dim() - 1)), new, old)


def save(folder: Path, net: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer as a folder of the library."""
    # Padding is a token that the model does not have, and that no text is cut into.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer),
        pad_token=PAD,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    with torch.device("meta"):
        model = MmrecForCausalLM(MmrecConfig(tokenizer.vocab_size, net.config.as_dict()))
    model.net = net
    # Not in the config: there it would have to be a token of the model.
    model.generation_config.pad_token_id = fast.pad_token_id
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file is written, in a moment
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    fast.save_pretrained(folder)


# Whoever imports this file needs no trust_remote_code.
AutoConfig.register(MmrecConfig.model_type, MmrecConfig)
AutoModelForCausalLM.register(MmrecConfig, MmrecForCausalLM)
