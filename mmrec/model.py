"""Multi-Memory Recurrence: a language model that reads with memories of constant size.

Every layer holds one memory, short (a number per channel) or long (a matrix per head), followed by a gated
feed-forward network. What has been read is in the state alone; it goes in and out of every call explicitly.

Legend of shapes: B rows, T tokens, D model width, E memory width, H heads, K = V = E / H, F feed-forward
width, C = convolution width, N vocabulary size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.errors import UserError, nearest
from mmrec.ops import chunked, fused

INITIAL_SCALE = 0.25
"""Of the initial weights, relative to 1 / sqrt(inputs); measured better than 1 at the tiny size."""

LayerState = tuple[Tensor, Tensor]
"""The last C - 1 inputs of the convolution [B, C - 1, channels], and the memory itself."""
State = list[LayerState]


@dataclass(frozen=True)
class Shape:
    """What fixes the architecture: two models of equal shape and vocabulary can exchange weights.

    Args:
        dim: width of the model, D.
        layers: number of layers.
        memories: the kind of memory of each layer, "short" or "long", repeated until there are ``layers``.
        heads: heads of a long memory, H; each holds a matrix of (dim / heads) squared numbers.
        ffn_dim: inner width of the feed-forward network, F.
        conv_width: tokens that the causal convolution sees, C; 1 leaves it without a past.
        tie_embeddings: read the input embedding also as the output layer.
        negative_eigenvalues: let a long memory turn what it holds for a key into its opposite, not only forget it:
            tracking a state, such as parity, needs that (Grazzi et al. 2024).
    """

    dim: int = 128
    layers: int = 4
    memories: Sequence[str] = ("short", "long")
    heads: int = 4
    ffn_dim: int = 256
    conv_width: int = 4
    tie_embeddings: bool = True
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"model.{field.name} is {value}; it must be a whole number, at least 1")
        if self.dim % self.heads:
            raise UserError(f"model.dim {self.dim} is not a multiple of model.heads {self.heads}")
        if not self.memories:
            raise UserError("model.memories is empty; name at least one of short, long")
        for kind in self.memories:
            if kind not in MEMORIES:
                hint = nearest(kind, MEMORIES)
                raise UserError(f"model.memories: unknown kind {kind!r}; known: {', '.join(MEMORIES)}{hint}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values only, so that a checkpoint loads with ``weights_only=True``."""
        shape = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.negative_eigenvalues:  # as before there was this field: the hash of such a model stays
            del shape["negative_eigenvalues"]
        return shape | {"memories": list(self.memories)}


class CausalConv(nn.Module):
    """Depth-wise convolution over the last C tokens, its past given and returned. [B, T, channels]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, past: Tensor, fresh: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if fresh is not None:
            return fused.causal_conv_of_documents(x, past, self.weight, fresh)
        return fused.causal_conv(x, past, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalization over the last dimension, of size ``dim``."""

    EPSILON = 1e-6

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.EPSILON)


class Memory(nn.Module, ABC):
    """What a layer remembers: (inputs [B, T, D], state) to (outputs [B, T, D], state)."""

    @abstractmethod
    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        """Return the state before the first token of ``rows`` texts."""

    @abstractmethod
    def forward(self, x: Tensor, state: LayerState, fresh: Tensor | None = None) -> tuple[Tensor, LayerState]:
        """Read ``x`` [B, T, D] on from ``state``, forgetting all before each token where ``fresh`` [B, T] is true."""


class ShortMemory(Memory):
    """Gated linear recurrence: D numbers that fade at learned, input-dependent rates.

    The real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4): :func:`mmrec.ops.reference.rg_lru`
    with the rate ``8 softplus(rate)``.
    """

    SHARPNESS = 8.0

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.dim
        self.project = nn.Linear(shape.dim, 4 * width, bias=False)  # z, r, i, output gate
        self.conv = CausalConv(width, shape.conv_width)
        self.r_bias = nn.Parameter(torch.zeros(width))
        self.i_bias = nn.Parameter(torch.zeros(width))
        # Half-lives log-uniform in 1..256 tokens where the gate r is one half.
        half_life = torch.exp(torch.linspace(0, math.log(256), width))
        rate = math.log(2) / half_life / (self.SHARPNESS / 2)
        self.rate = nn.Parameter(torch.log(torch.expm1(rate)))
        self.output = nn.Linear(width, shape.dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        channels, width = self.conv.weight.shape
        past = torch.zeros(rows, width - 1, channels, device=device, dtype=dtype)
        return past, torch.zeros(rows, channels, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState, fresh: Tensor | None = None) -> tuple[Tensor, LayerState]:
        z, r, i, gate = self.project(x).chunk(4, dim=-1)
        z, past = self.conv(z, state[0], fresh)
        dtype, rate = state[1].dtype, self.SHARPNESS * F.softplus(self.rate)
        h, memory = chunked.rg_lru(r.to(dtype) + self.r_bias, i.to(dtype) + self.i_bias, z, rate, state[1], fresh)
        return self.output(h.to(x.dtype) * gate.sigmoid()), (past, memory)


class LongMemory(Memory):
    """Gated delta rule: per head a matrix that is told what to hold for a key, and corrects itself.

    Gated Delta Networks (Yang, Kautz, Hatamizadeh 2024); half-lives start log-uniform in 8..8192 tokens. With
    ``negative_eigenvalues`` the strength of a correction is in 0..2 instead of 0..1 (Grazzi et al. 2024).
    """

    GATE_RANK = 16

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, heads = shape.dim, shape.heads
        self.heads = heads
        self.strongest = 2.0 if shape.negative_eigenvalues else 1.0
        self.splits = [3 * width, heads, heads, self.GATE_RANK]  # q k v, decay, beta, low-rank output gate
        self.project = nn.Linear(shape.dim, sum(self.splits), bias=False)
        self.conv = CausalConv(3 * width, shape.conv_width)
        half_life = torch.exp(torch.linspace(math.log(8), math.log(8192), heads))
        self.log_rate = nn.Parameter(torch.log(math.log(2) / half_life))
        self.decay_bias = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus of it is 1
        self.beta_bias = nn.Parameter(torch.zeros(heads))
        self.gate = nn.Linear(self.GATE_RANK, width, bias=False)
        self.norm = RMSNorm(width // heads)
        self.output = nn.Linear(width, shape.dim, bias=False)

    def zero_state(self, rows: int, device: torch.device, dtype: torch.dtype) -> LayerState:
        channels, width = self.conv.weight.shape
        size = channels // 3 // self.heads
        past = torch.zeros(rows, width - 1, channels, device=device, dtype=dtype)
        return past, torch.zeros(rows, self.heads, size, size, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: LayerState, fresh: Tensor | None = None) -> tuple[Tensor, LayerState]:
        rows, length, _ = x.shape
        qkv, decay, beta, gate = self.project(x).split(self.splits, dim=-1)
        qkv, past = self.conv(qkv, state[0], fresh)
        q, k, v = F.silu(qkv).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dtype = state[1].dtype
        q, k = _unit_length(q.to(dtype)), _unit_length(k.to(dtype))
        log_decay = -self.log_rate.exp() * F.softplus(decay.to(dtype) + self.decay_bias)
        log_decay = _forget(log_decay, fresh)
        strength = self.strongest * (beta.to(dtype) + self.beta_bias).sigmoid()
        o, memory = chunked.gated_delta_rule(q, k, v, log_decay.mT, strength.mT, state[1])
        o = self.norm(o).to(x.dtype).transpose(1, 2).reshape(rows, length, -1)
        return self.output(o * self.gate(gate).sigmoid()), (past, memory)


MEMORIES: dict[str, Callable[[Shape], Memory]] = {"short": ShortMemory, "long": LongMemory}


FORGET = -30.0
"""Logarithm of a decay that leaves nothing in float32, and small enough for sums of many to stay exact."""


def _forget(log_decay: Tensor, fresh: Tensor | None) -> Tensor:
    """Return ``log_decay`` [B, T, any] with all forgotten at the tokens where ``fresh`` [B, T] is true."""
    return log_decay if fresh is None else log_decay.masked_fill(fresh.unsqueeze(-1), FORGET)


def _unit_length(x: Tensor) -> Tensor:
    # The epsilon stands inside the root: a zero vector then has a finite gradient.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): [B, T, D] to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.project = nn.Linear(shape.dim, 2 * shape.ffn_dim, bias=False)
        self.output = nn.Linear(shape.ffn_dim, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(fused.swiglu(self.project(x)))


class Block(nn.Module):
    """One layer: a memory and a feed-forward network, each normalized before and added to the stream."""

    def __init__(self, shape: Shape, kind: str, dropout: float) -> None:
        super().__init__()
        self.memory_norm = RMSNorm(shape.dim)
        self.memory = MEMORIES[kind](shape)
        self.ffn_norm = RMSNorm(shape.dim)
        self.ffn = FeedForward(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, state: LayerState, fresh: Tensor | None = None) -> tuple[Tensor, LayerState]:
        y, state = self.memory(self.memory_norm(x), state, fresh)
        x = x + self.dropout(y)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), state


class MemoryLM(nn.Module):
    """The language model: tokens and a state in, logits and the new state out.

    Args:
        shape: the architecture.
        vocab_size: number of different tokens, N.
        dropout: share of activations dropped in training, after the embedding and each residual branch.
    """

    def __init__(self, shape: Shape, vocab_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, kind, dropout) for kind in self.kinds())
        self.dropout = nn.Dropout(dropout)
        self.norm = RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, vocab_size, bias=False)
        self.tie()
        self._initialize()

    def tie(self) -> None:
        """Make the output layer read the input embedding, where the shape says so."""
        if self.shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _initialize(self) -> None:
        """Normal weights, small beside the width's root; what every branch adds to the stream, smaller still."""
        for parameter in self.matrices():
            nn.init.normal_(parameter, std=INITIAL_SCALE * parameter.shape[1] ** -0.5)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=INITIAL_SCALE * self.shape.dim**-0.5)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("output"):
                module.weight.data.mul_((2 * self.shape.layers) ** -0.5)

    def kinds(self) -> list[str]:
        """Return the kind of memory of each layer."""
        return [self.shape.memories[i % len(self.shape.memories)] for i in range(self.shape.layers)]

    def matrices(self) -> list[Tensor]:
        """Return the weights of all linear maps inside the layers: neither embeddings nor convolutions."""
        return [module.weight for module in self.blocks.modules() if isinstance(module, nn.Linear)]

    def zero_state(self, rows: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> State:
        """Return the state before the first token of ``rows`` texts; its size does not depend on the text."""
        device = device or self.embedding.weight.device
        dtype = dtype or self.embedding.weight.dtype
        memories = (block.get_submodule("memory") for block in self.blocks)
        return [memory.zero_state(rows, device, dtype) for memory in memories if isinstance(memory, Memory)]

    def forward(self, tokens: Tensor, state: State, fresh: Tensor | None = None) -> tuple[Tensor, State]:
        """Read tokens and predict, after each, the next one.

        Args:
            tokens: [B, T], integers below N.
            state: what was read before, from :meth:`zero_state` or an earlier call. It is not changed.
            fresh: [B, T], bool: tokens before which all is forgotten; none if left out.

        Returns:
            Logits [B, T, N] and the state after the last token.
        """
        hidden, after = self.hidden(tokens, state, fresh)
        logits: Tensor = self.head(hidden)
        return logits, after

    def hidden(self, tokens: Tensor, state: State, fresh: Tensor | None = None) -> tuple[Tensor, State]:
        """Read as :meth:`forward` does, and return what ``head`` makes the logits of, [B, T, D]."""
        x = self.dropout(self.embedding(tokens))
        after: State = []
        for block, before in zip(self.blocks, state, strict=True):
            x, layer_state = block(x, before, fresh)
            after.append(layer_state)
        return self.norm(x), after

    def parameter_count(self) -> int:
        """Return the number of trainable numbers; a tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def state_count(self) -> int:
        """Return how many numbers the state of one text holds."""
        state = self.zero_state(1, torch.device("meta"))
        return sum(tensor.numel() for layer in state for tensor in layer)


def detach_state(state: State) -> State:
    """Return the state cut off from the graph that made it: the truncation of back-propagation in time."""
    return [(past.detach(), memory.detach()) for past, memory in state]


def reset_rows(state: State, fresh: Tensor) -> State:
    """Return the state with the rows where ``fresh`` [B] (bool) is true set to zero, as before any text."""

    def cleared(x: Tensor) -> Tensor:
        return x.masked_fill(fresh.view(-1, *[1] * (x.dim() - 1)), 0)

    return [(cleared(past), cleared(memory)) for past, memory in state]
