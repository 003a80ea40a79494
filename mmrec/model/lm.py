"""The language model: an embedding, blocks of a recurrent and a feed-forward layer, and the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmrec.model.config import LAYER_TYPES, ModelConfig
from mmrec.model.layers import FeedForward, RMSNorm
from mmrec.model.ops import dispatch
from mmrec.model.recurrent_layer import RecurrentLayer
from mmrec.model.state import LayerState, State
from mmrec.model.token_counts import CountFeatures, TokenCounts

INITIAL_SCALE = 0.25
"""Of the initial weights, relative to 1 / sqrt(inputs); measured better than 1 at the tiny size."""


class Block(nn.Module):
    """A recurrent layer and a feed-forward network, each pre-normalized and added to the residual stream.

    Attributes:
        activation_checkpointing: keep the inputs alone for the backward pass, which computes the block once more
            (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """

    activation_checkpointing = False

    def __init__(self, config: ModelConfig, kind: str, dropout: float) -> None:
        super().__init__()
        self.memory_norm = RMSNorm(config.dim, feeds_product=True)
        self.memory = LAYER_TYPES[kind](config)
        self.ffn_norm = RMSNorm(config.dim, feeds_product=True)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.dropout = dropout

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            after: tuple[Tensor, LayerState] = checkpoint(self._compute, x, state, reset_mask, use_reentrant=False)
            return after
        return self._compute(x, state, reset_mask)

    def _compute(self, x: Tensor, state: LayerState, reset_mask: Tensor | None) -> tuple[Tensor, LayerState]:
        y, state = self.memory(self.memory_norm(x), state, reset_mask)
        dropout = self.dropout if self.training else 0.0
        x = dispatch.dropout_add(x, y, dropout)
        return dispatch.dropout_add(x, self.ffn(self.ffn_norm(x)), dropout), state


class Hidden(NamedTuple):
    """What a model has computed of tokens before it makes logits of it.

    Attributes:
        x: [B, T, D], the residual stream after the last norm.
        counted: what the counts of tokens say there; None of a model without.
    """

    x: Tensor
    counted: CountFeatures | None = None

    def narrow(self, start: int, length: int) -> Hidden:
        """Return the same of ``length`` tokens from ``start`` on, a multiple of ``SPAN``."""
        counted = None if self.counted is None else self.counted.narrow(start, length)
        return Hidden(self.x.narrow(1, start, length), counted)


class RecurrentLM(nn.Module):
    """The language model: tokens and a state in, logits and the new state out.

    Args:
        config: the architecture.
        vocab_size: number of different tokens, N.
        dropout: share of activations dropped in training, after the embedding and each residual branch.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, kind, dropout) for kind in self.layer_types())
        self.dropout = nn.Dropout(dropout)
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        half_lives = config.count_half_lives
        self.counts = TokenCounts(config.dim, vocab_size, half_lives) if half_lives else None
        self.tie()
        self._initialize()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Choose whether the blocks are computed once more in the backward pass, instead of keeping what it needs."""
        for block in self.blocks:
            block.activation_checkpointing = on  # type: ignore[assignment]

    def tie(self) -> None:
        """Make the output layer read the input embedding, where the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self) -> None:
        """Draw the matrices from a normal distribution; the branches' outputs are smaller, by the number of them."""
        for parameter in self.matrices():
            nn.init.normal_(parameter, std=INITIAL_SCALE * parameter.shape[1] ** -0.5)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=INITIAL_SCALE * self.config.dim**-0.5)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("output"):
                module.weight.data.mul_((2 * self.config.layers) ** -0.5)

    def layer_types(self) -> list[str]:
        """Return the name of each block's recurrent layer, as in the config."""
        return [self.config.layer_types[i % len(self.config.layer_types)] for i in range(self.config.layers)]

    def recurrent_layers(self) -> list[RecurrentLayer]:
        """Return the recurrent layer of each block, the first block's first."""
        layers = [block.get_submodule("memory") for block in self.blocks]
        return [layer for layer in layers if isinstance(layer, RecurrentLayer)]

    def matrices(self) -> list[Tensor]:
        """Return the weights of all linear maps inside the blocks: neither embeddings nor convolutions."""
        return [module.weight for module in self.blocks.modules() if isinstance(module, nn.Linear)]

    def zero_state(self, rows: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """Return the state before the first token of ``rows`` texts; its size does not depend on the text."""
        device = device or self.embedding.weight.device
        dtype = dtype or self.embedding.weight.dtype
        state = [layer.zero_state(rows, device, dtype) for layer in self.recurrent_layers()]
        return state if self.counts is None else [*state, self.counts.zero_state(rows, device)]

    def forward(self, tokens: Tensor, state: State, reset_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read tokens and predict, after each, the next one.

        Args:
            tokens: [B, T], integers below N.
            state: what was read before, from :meth:`zero_state` or an earlier call. It is not changed.
            reset_mask: [B, T], bool: tokens before which the state is set to zero; none if left out.

        Returns:
            Logits [B, T, N] and the state after the last token.
        """
        hidden, after = self.hidden(tokens, state, reset_mask)
        return self.logits(hidden), after

    def logits(self, hidden: Hidden) -> Tensor:
        """Return the logits [B, T, N] of what :meth:`hidden` has found."""
        logits: Tensor = self.head(hidden.x)
        if self.counts is None or hidden.counted is None:
            return logits
        return self.counts.add(logits, hidden.x, hidden.counted)

    def hidden(self, tokens: Tensor, state: State, reset_mask: Tensor | None = None) -> tuple[Hidden, State]:
        """Read as :meth:`forward` does, and return what :meth:`logits` makes the logits of."""
        x, after = self.hidden_from_embeddings(self.embedding(tokens), state[: len(self.blocks)], reset_mask)
        return self.with_counts(x, after, tokens, state, reset_mask)

    def with_counts(
        self, x: Tensor, after: State, tokens: Tensor, before: State, reset_mask: Tensor | None = None
    ) -> tuple[Hidden, State]:
        """Return what :meth:`hidden` does, where all but the counts of tokens is known: ``x`` and ``after``.

        Of the state ``before`` only the last entry is used, that of the counts.
        """
        if self.counts is None:
            return Hidden(x), after
        counted, counts = self.counts.read(tokens, before[-1], reset_mask)
        return Hidden(x, counted), [*after, counts]

    def hidden_from_embeddings(
        self, x: Tensor, state: State, reset_mask: Tensor | None = None, streams: list[Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Read as :meth:`hidden` does, from embeddings ``x`` [B, T, D] in the place of tokens.

        Where a list of ``streams`` is given, the residual stream before each block [B, T, D] is appended to it.
        """
        x = self.dropout(x)
        after: State = []
        for block, before in zip(self.blocks, state, strict=True):
            if streams is not None:
                streams.append(x)
            x, layer_state = block(x, before, reset_mask)
            after.append(layer_state)
        return self.norm(x), after

    def state_layers(self) -> int:
        """Return how many entries a state has: one a block, and one of the counts of tokens, where there are some."""
        return len(self.blocks) + (self.counts is not None)

    def parameter_count(self) -> int:
        """Return the number of trainable numbers; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def state_size(self) -> int:
        """Return how many numbers the state of one text holds."""
        state = self.zero_state(1, torch.device("meta"))
        return sum(tensor.numel() for layer in state for tensor in layer)
