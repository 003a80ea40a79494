"""The model as a causal language model of transformers: its state is what ``generate`` keeps as a cache."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmrec.export.hf.cache import StateCache
from mmrec.export.hf.configuration import MODULE, MmrecConfig
from mmrec.export.hf.padding import Outputs, Reader
from mmrec.model import ModelConfig, RecurrentLM

NOTHING_TO_READ = "there is no token to read (B = {}, T = {}): an empty text predicts nothing"
IGNORE_INDEX = -100
"""The label that is not scored: torch's."""


def code() -> str:
    """Return the text of the module with these classes that stands in an exported folder."""
    here = Path(__file__)
    if here.name == f"{MODULE}.py":  # it is that module
        return here.read_text(encoding="utf-8")
    text: str = import_module("mmrec.export.hf.bundle").bundled_code()
    return text


class MmrecForCausalLM(PreTrainedModel, GenerationMixin):
    """:class:`mmrec.model.RecurrentLM`, as the library calls a model."""

    config_class = MmrecConfig
    _tied_weights_keys = {"net.head.weight": "net.embedding.weight"}  # noqa: RUF012 -- the library's own form
    _is_stateful = True

    def __init__(self, config: MmrecConfig) -> None:
        super().__init__(config)
        self.net = RecurrentLM(ModelConfig.from_dict(config.architecture), config.vocab_size)
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
        """Save as the library does, with the code of its classes."""
        super().save_pretrained(save_directory, *args, **kwargs)
        (Path(save_directory) / f"{MODULE}.py").write_text(code(), encoding="utf-8")

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the library does; ValueError where there is no token to go on from."""
        given = kwargs.get("input_ids") if inputs is None else inputs
        if isinstance(given, Tensor) and not given.numel():
            raise ValueError(NOTHING_TO_READ.format(len(given), given.shape[-1]))
        library: Any = super()
        return library.generate(inputs, *args, **kwargs)

    def forward(  # more than 8 parameters: they are those that the library passes by name
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens and predict, after each, the next one.

        Padding, wherever it stands, leaves the state as it is, and is never scored.

        Args:
            input_ids: [B, T], tokens of the model. The tokenizer's padding token is none of them: it is padding also
                without a mask.
            attention_mask: [B, at least T], 0 for padding and 1 elsewhere; the last T columns count.
            past_key_values: what was read before; it is changed, unless ``use_cache`` is False.
            inputs_embeds: [B, T, D], in the place of ``input_ids``.
            labels: [B, T], as ``input_ids``: the label at a place is predicted at the place before it. Not scored are
                -100, padding, and the first token of a row.
            use_cache: return the state; as the config says if left out.
            output_hidden_states: return the residual stream before each block and what the logits are computed from,
                each [B, T, D].
            logits_to_keep: return only so many last logits, or those of these positions; 0 returns all.
            return_dict: False returns a tuple; as the config says if left out.
            kwargs: ``position_ids`` [B, T]: where they begin anew in a row, a text ends and the state is set to zero;
                what the loss takes (``num_items_in_batch``, ``shift_labels``).

        Returns:
            The mean loss in nats, the logits [B, T, N], the state as ``past_key_values``, and the hidden states:
            those that there are.

        Raises:
            ValueError: the inputs do not fit each other or the model, or a row has no token.
            TypeError: ``past_key_values`` is a cache of keys and values.
        """
        self._check_options(kwargs)
        inputs, real = self._check_inputs(input_ids, inputs_embeds, attention_mask)
        cache = self._check_cache(past_key_values, real)
        keep = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        reader = Reader(self.net, keep if keep and not output_hidden_states else real.shape[1], output_hidden_states)
        read = self._read(reader, inputs, real, cache, _new_texts(kwargs.pop("position_ids", None), real))
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache or past_key_values is None:
            cache.state, cache.hidden = read.state, read.hidden[:, -1]
            cache.length += real.shape[1]
        loss, hidden = None, read.hidden
        if labels is None:
            hidden = _kept(hidden, logits_to_keep)
        width = self.config.hidden_size
        logits = self.net.head(hidden[..., :width])
        if self.net.counts is not None:
            logits = logits + hidden[..., width:]
        if labels is not None:
            loss = self._loss(logits, labels, real, kwargs)
            logits = _kept(logits, logits_to_keep)
        cached: Any = cache if use_cache else None  # it stands in for the library's own class
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cached,
            hidden_states=(*read.streams, read.hidden[..., :width]) if output_hidden_states else None,
        )
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    def _read(
        self, reader: Reader, inputs: Tensor, real: Tensor, cache: StateCache, reset_mask: Tensor | None
    ) -> Outputs:
        if cache.state is None:
            # At least float32 whatever the weights are: small steps would be lost in less.
            dtype = torch.promote_types(self.net.embedding.weight.dtype, torch.float32)
            state = self.net.zero_state(len(real), dtype=dtype)
            if bool(real.all()):
                return reader.read(inputs, state, reset_mask)
            if self.net.counts is not None:  # which count from the first token of a row
                nothing = self.net.norm.weight.new_zeros(len(real), self.config.hidden_size + self.config.vocab_size)
                return reader.read_on(inputs, real, state, nothing, reset_mask)
            return reader.read_first(inputs, real, state, reset_mask)
        if bool(real.all()):
            return reader.read(inputs, cache.state, reset_mask)
        assert cache.hidden is not None
        return reader.read_on(inputs, real, cache.state, cache.hidden, reset_mask)

    def _check_options(self, kwargs: dict[str, Any]) -> None:
        if kwargs.pop("output_attentions", None) or self.config.output_attentions:
            raise ValueError("output_attentions is set; this model has no attention")
        for name in ("decoder_input_ids", "encoder_outputs", "cache_params", "token_type_ids"):
            given = kwargs.pop(name, None)
            if given is not None and (name != "token_type_ids" or bool(given.any())):
                raise ValueError(f"{name} is given; this model does not take it")

    def _check_inputs(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return tokens [B, T] with 0 for padding, or embeddings [B, T, D], and where they are real [B, T]."""
        if input_ids is not None and inputs_embeds is None:
            if input_ids.dim() != 2:
                raise ValueError(f"input_ids is {list(input_ids.shape)}; it must be [B, T]")
            real = input_ids != self._pad_token()
        elif inputs_embeds is not None and input_ids is None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                shape = f"[B, T, {self.config.hidden_size}]"
                raise ValueError(f"inputs_embeds is {list(inputs_embeds.shape)}; it must be {shape}")
            if self.net.counts is not None:
                raise ValueError("inputs_embeds is given; this model counts tokens, and takes input_ids alone")
            real = torch.ones(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        else:
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None:
            real = real & _last_columns(attention_mask, real)
        if inputs_embeds is not None:
            return inputs_embeds, real
        assert input_ids is not None
        tokens = input_ids.masked_fill(~real, 0)
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.config.vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)][0]
            raise ValueError(f"input_ids has {int(wrong)}; the model's tokens are 0 to {self.config.vocab_size - 1}")
        return tokens, real

    def _check_cache(self, given: StateCache | None, real: Tensor) -> StateCache:
        rows, length = real.shape
        if given is not None and type(given).__name__ != StateCache.__name__:  # mmrec's own, or an exported folder's
            raise TypeError(
                f"past_key_values is a {type(given).__name__}; this model keeps a state of constant size: give none "
                "at first and then what the model returned, or a StateCache"
            )
        if not rows or not length:
            raise ValueError(NOTHING_TO_READ.format(rows, length))
        if given is None and not bool(real.any(1).all()):
            row = int((~real.any(1)).nonzero()[0])
            raise ValueError(f"row {row} has no token, only padding: an empty text predicts nothing")
        if given is not None and given.rows not in (None, rows):
            raise ValueError(
                f"past_key_values has {given.rows} rows and the input {rows}; see StateCache.batch_repeat_interleave"
            )
        return StateCache() if given is None else given

    def _pad_token(self) -> int:
        """Return the padding token where it is none of the model's tokens, and else -1: then only a mask says so."""
        pad = self.generation_config.pad_token_id
        return pad if isinstance(pad, int) and pad >= self.config.vocab_size else -1

    def _loss(self, logits: Tensor, labels: Tensor, real: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if labels.shape != real.shape:
            raise ValueError(f"labels is {list(labels.shape)}; it must be {list(real.shape)}, as the input is")
        labels = labels.masked_fill((real.cumsum(1) <= 1) | ~real | (labels == self._pad_token()), IGNORE_INDEX)
        shifted = kwargs.pop("shift_labels", None)
        if shifted is None:
            shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        else:
            shifted = shifted.masked_fill(~real | (shifted == self._pad_token()), IGNORE_INDEX)
        scored = shifted[shifted != IGNORE_INDEX]
        if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < self.config.vocab_size:
            raise ValueError(f"labels are the model's tokens, 0 to {self.config.vocab_size - 1}, or {IGNORE_INDEX}")
        if not scored.numel() and kwargs.get("num_items_in_batch") is None:
            raise ValueError("labels: no token is scored, so the loss would be no number")
        size = self.config.vocab_size
        loss: Tensor = self.loss_function(
            logits=logits, labels=labels, vocab_size=size, shift_labels=shifted.contiguous(), **kwargs
        )
        return loss


def _last_columns(mask: Tensor, real: Tensor) -> Tensor:
    """Return the last columns of an attention mask as bool [B, T], the form of ``real``."""
    rows, length = real.shape
    if mask.dim() != 2 or len(mask) != rows or mask.shape[1] < length:
        raise ValueError(f"attention_mask is {list(mask.shape)}; it must be [{rows}, at least {length}]")
    mask = mask[:, mask.shape[1] - length :].to(real.device)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask has other values than 0, for padding, and 1")
    return mask.bool()


def _new_texts(position_ids: Tensor | None, real: Tensor) -> Tensor | None:
    """Return where in a row a new text begins [B, T], as texts that are packed into one row say; None if nowhere."""
    if position_ids is None:
        return None
    if (
        position_ids.dim() != 2
        or position_ids.shape[0] not in (1, len(real))
        or position_ids.shape[1] != real.shape[1]
    ):
        raise ValueError(f"position_ids is {list(position_ids.shape)}; it must be {list(real.shape)}")
    begins = (position_ids == 0).expand(real.shape) & real & (real.cumsum(1) > 1)
    return begins if bool(begins.any()) else None


def _kept(x: Tensor, positions: int | Tensor) -> Tensor:
    return x[:, -positions:] if isinstance(positions, int) else x[:, positions]
