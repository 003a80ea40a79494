"""Multi-Memory Recurrence: a language model that reads with memories of constant size.

Every layer holds one memory, short (a number per channel) or long (a matrix per head), followed by a gated
feed-forward network. What has been read is in the state alone; it goes in and out of every call explicitly.

Legend of shapes: B rows, T tokens, D model width, H heads, K = V = D / H, F feed-forward width, C convolution
width, N vocabulary size. docs/model.md has the equations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.core.errors import UserError, nearest
from mmrec.model.ops import chunked, fused

INITIAL_SCALE = 0.25
"""Of the initial weights, relative to 1 / sqrt(inputs); measured better than 1 at the tiny size."""

LayerState = tuple[Tensor, Tensor]
"""The last C - 1 inputs of the convolution [B, C - 1, channels], and the memory itself."""
State = list[LayerState]


@dataclass(frozen=True)
class ModelConfig:
    """What fixes the architecture: two models of equal shape and vocabulary can exchange weights.

    Args:
        dim: width of the model, D.
        layers: number of layers.
        layer_types: the recurrent layer of each block, "short" (RG-LRU) or "long" (gated delta rule), repeated until
            there are ``layers``.
        heads: heads of a long memory, H; each holds a matrix of (dim / heads) squared numbers.
        ffn_dim: inner width of the feed-forward network, F.
        conv_width: tokens that the causal convolution sees, C; 1 leaves it without a past.
        tie_embeddings: read the input embedding also as the output layer.
        negative_eigenvalues: let a long memory turn what it holds for a key into its opposite, not only forget it:
            tracking a state, such as parity, needs that (Grazzi et al. 2024).
    """

    dim: int = 128
    layers: int = 4
    layer_types: Sequence[str] = ("short", "long")
    heads: int = 4
    ffn_dim: int = 256
    conv_width: int = 4
    tie_embeddings: bool = True
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"model.config.{field.name} is {value}; it must be a whole number, at least 1")
        if self.dim % self.heads:
            raise UserError(f"model.config.dim {self.dim} is not a multiple of model.config.heads {self.heads}")
        if not self.layer_types:
            raise UserError("model.config.layer_types is empty; name at least one of short, long")
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                hint = nearest(kind, LAYER_TYPES)
                raise UserError(
                    f"model.config.layer_types: unknown kind {kind!r}; known: {', '.join(LAYER_TYPES)}{hint}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, under the names that files of models know them by.

        These names are those of the first version of the format: checkpoints, memory files and hashes of models
        keep them, so that old files and new ones can be told to be of the same model.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.negative_eigenvalues:  # as before there was this field: the hash of such a model stays
            del values["negative_eigenvalues"]
        values["memories"] = list(values.pop("layer_types"))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Return the config that :meth:`as_dict` described; TypeError where ``values`` has a field of no config."""
        named = {"layer_types" if name == "memories" else name: value for name, value in values.items()}
        return cls(**named)


class CausalConv(nn.Module):
    """Depth-wise convolution over the last C tokens, its past given and returned. [B, T, channels]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, past: Tensor, reset_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if reset_mask is not None:
            return fused.causal_conv_of_documents(x, past, self.weight, reset_mask)
        return fused.causal_conv(x, past, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension, of size ``dim``."""

    EPSILON = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.EPSILON)


class RecurrentLayer(nn.Module, ABC):
    """A layer with a state of constant size: (inputs [B, T, D], state) to (outputs [B, T, D], state)."""

    @abstractmethod
    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state before the first token of ``rows`` texts."""

    @abstractmethod
    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Read ``x`` [B, T, D] on from ``state``, zero before each token where ``reset_mask`` [B, T] is true."""


class RGLRU(RecurrentLayer):
    """Gated linear recurrence: D numbers that fade at learned, input-dependent rates.

    After the real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4):
    :func:`mmrec.model.ops.reference.rg_lru` with the rate ``8 softplus(rate)``. Where it differs: both gates are read
    from the layer's input, before the convolution, by full matrices (Griffin: after it, by block-diagonal ones); the
    first input after a reset is scaled by ``sqrt(1 - a^2)`` as any other (Griffin's code: by 1); the output gate is a
    sigmoid (Griffin: GeLU).
    """

    DECAY_SCALE = 8.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.dim
        self.project = nn.Linear(config.dim, 4 * width, bias=False)  # z, r, i, output gate
        self.conv = CausalConv(width, config.conv_width)
        self.r_bias = nn.Parameter(torch.zeros(width))
        self.i_bias = nn.Parameter(torch.zeros(width))
        # Half-lives log-uniform in 1..256 tokens where the gate r is one half.
        half_life = torch.exp(torch.linspace(0, math.log(256), width))
        rate = math.log(2) / half_life / (self.DECAY_SCALE / 2)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))
        self.output = nn.Linear(width, config.dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        channels, width = self.conv.weight.shape
        past = torch.zeros(rows, width - 1, channels, device=device, dtype=dtype)
        return past, torch.zeros(rows, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        z, r, i, gate = self.project(x).chunk(4, dim=-1)
        z, past = self.conv(z, state[0], reset_mask)
        dtype, rate = state[1].dtype, self.DECAY_SCALE * F.softplus(self.rate)
        r, i = r.to(dtype) + self.r_bias, i.to(dtype) + self.i_bias
        h, memory = chunked.rg_lru(r, i, z, rate, state[1], reset_mask)
        return self.output(h.to(x.dtype) * gate.sigmoid()), (past, memory)


class GatedDeltaNet(RecurrentLayer):
    """Gated delta rule: per head a matrix that is told what to hold for a key, and corrects itself.

    After Gated Delta Networks (Yang, Kautz, Hatamizadeh 2024); half-lives start log-uniform in 8..8192 tokens. With
    ``negative_eigenvalues`` the strength of a correction is in 0..2 instead of 0..1 (Grazzi et al. 2024). Where it
    differs: the output gate is a sigmoid of a map of low rank (there: SiLU of a full one); queries are not scaled by
    ``1 / sqrt(K)``, which the norm that follows would take out again; values are as wide as keys (there: twice).
    """

    GATE_RANK = 16

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.dim, config.heads
        self.heads = heads
        self.strongest = 2.0 if config.negative_eigenvalues else 1.0
        self.splits = [3 * width, heads, heads, self.GATE_RANK]  # q k v, decay, beta, low-rank output gate
        self.project = nn.Linear(config.dim, sum(self.splits), bias=False)
        self.conv = CausalConv(3 * width, config.conv_width)
        half_life = torch.exp(torch.linspace(math.log(8), math.log(8192), heads))
        self.log_rate = nn.Parameter(torch.log(math.log(2) / half_life))
        self.decay_bias = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus of it is 1
        self.beta_bias = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Linear(self.GATE_RANK, width, bias=False)
        self.norm = RMSNorm(width // heads)
        self.output = nn.Linear(width, config.dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        channels, width = self.conv.weight.shape
        size = channels // 3 // self.heads
        past = torch.zeros(rows, width - 1, channels, device=device, dtype=dtype)
        return past, torch.zeros(rows, self.heads, size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        rows, length, _ = x.shape
        qkv, decay, beta, gate = self.project(x).split(self.splits, dim=-1)
        qkv, past = self.conv(qkv, state[0], reset_mask)
        q, k, v = F.silu(qkv).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dtype = state[1].dtype
        q, k = l2_normalize(q.to(dtype)), l2_normalize(k.to(dtype))
        log_decay = -self.log_rate.exp() * F.softplus(decay.to(dtype) + self.decay_bias)
        log_decay = apply_reset(log_decay, reset_mask)
        strength = self.strongest * (beta.to(dtype) + self.beta_bias).sigmoid()
        o, memory = chunked.gated_delta_rule(q, k, v, log_decay.mT, strength.mT, state[1])
        o = self.norm(o).to(x.dtype).transpose(1, 2).reshape(rows, length, -1)
        return self.output(o * self.gate(gate).sigmoid()), (past, memory)


LAYER_TYPES: dict[str, Callable[[ModelConfig], RecurrentLayer]] = {"short": RGLRU, "long": GatedDeltaNet}


RESET_LOG_DECAY = -30.0
"""Logarithm of a decay that leaves nothing in float32, and small enough for sums of many to stay exact."""


def apply_reset(log_decay: Tensor, reset_mask: Tensor | None) -> Tensor:
    """Return ``log_decay`` [B, T, any] with all forgotten at the tokens where ``reset_mask`` [B, T] is true."""
    return log_decay if reset_mask is None else log_decay.masked_fill(reset_mask.unsqueeze(-1), RESET_LOG_DECAY)


def l2_normalize(x: Tensor) -> Tensor:
    # The epsilon stands inside the root: a zero vector then has a finite gradient.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): [B, T, D] to the same."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.output = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(fused.swiglu(self.project(x)))


class Block(nn.Module):
    """One layer: a memory and a feed-forward network, each normalized before and added to the stream."""

    def __init__(self, config: ModelConfig, kind: str, dropout: float) -> None:
        super().__init__()
        self.memory_norm = RMSNorm(config.dim)
        self.memory = LAYER_TYPES[kind](config)
        self.ffn_norm = RMSNorm(config.dim)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: LayerState, reset_mask: Tensor | None = None) -> tuple[Tensor, LayerState]:
        y, state = self.memory(self.memory_norm(x), state, reset_mask)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), state


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
        self.tie()
        self._initialize()

    def tie(self) -> None:
        """Make the output layer read the input embedding, where the config says so."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self) -> None:
        """Normal weights, small beside the width's root; what every branch adds to the stream, smaller still."""
        for parameter in self.matrices():
            nn.init.normal_(parameter, std=INITIAL_SCALE * parameter.shape[1] ** -0.5)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=INITIAL_SCALE * self.config.dim**-0.5)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("output"):
                module.weight.data.mul_((2 * self.config.layers) ** -0.5)

    def layer_types(self) -> list[str]:
        """Return the kind of memory of each layer."""
        return [self.config.layer_types[i % len(self.config.layer_types)] for i in range(self.config.layers)]

    def matrices(self) -> list[Tensor]:
        """Return the weights of all linear maps inside the layers: neither embeddings nor convolutions."""
        return [module.weight for module in self.blocks.modules() if isinstance(module, nn.Linear)]

    def zero_state(self, rows: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """Return the state before the first token of ``rows`` texts; its size does not depend on the text."""
        device = device or self.embedding.weight.device
        dtype = dtype or self.embedding.weight.dtype
        memories = (block.get_submodule("memory") for block in self.blocks)
        return [memory.zero_state(rows, device, dtype) for memory in memories if isinstance(memory, RecurrentLayer)]

    def forward(self, tokens: Tensor, state: State, reset_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read tokens and predict, after each, the next one.

        Args:
            tokens: [B, T], integers below N.
            state: what was read before, from :meth:`zero_state` or an earlier call. It is not changed.
            reset_mask: [B, T], bool: tokens before which all is forgotten; none if left out.

        Returns:
            Logits [B, T, N] and the state after the last token.
        """
        hidden, after = self.hidden(tokens, state, reset_mask)
        logits: Tensor = self.head(hidden)
        return logits, after

    def hidden(self, tokens: Tensor, state: State, reset_mask: Tensor | None = None) -> tuple[Tensor, State]:
        """Read as :meth:`forward` does, and return what ``head`` makes the logits of, [B, T, D]."""
        x = self.dropout(self.embedding(tokens))
        after: State = []
        for block, before in zip(self.blocks, state, strict=True):
            x, layer_state = block(x, before, reset_mask)
            after.append(layer_state)
        return self.norm(x), after

    def parameter_count(self) -> int:
        """Return the number of trainable numbers; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def state_size(self) -> int:
        """Return how many numbers the state of one text holds."""
        state = self.zero_state(1, torch.device("meta"))
        return sum(tensor.numel() for layer in state for tensor in layer)


def detach_state(state: State) -> State:
    """Return the state cut off from the graph that made it: the truncation of back-propagation in time."""
    return [(past.detach(), memory.detach()) for past, memory in state]


def reset_state_rows(state: State, reset_mask: Tensor) -> State:
    """Return the state with the rows where ``reset_mask`` [B] (bool) is true set to zero, as before any text."""

    def cleared(x: Tensor) -> Tensor:
        return x.masked_fill(reset_mask.view(-1, *[1] * (x.dim() - 1)), 0)

    return [(cleared(past), cleared(memory)) for past, memory in state]
