"""A language model of mmrec in plain MLX. Where this file runs, neither mmrec nor torch is needed.

It stands in the folder that ``mmrec export --format mlx`` writes, beside the config, the weights and the tokenizer::

    pip install mlx tokenizers              # on Linux: "mlx[cpu]"
    python out/mlx/mlx_model.py "It was"

The state that the model carries from token to token is of constant size, however long the text is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

NORM_EPSILON = 1e-6
READ_CHUNK = 256
"""Tokens of a prompt that are read at once."""
SPAN = 32
"""Tokens that are predicted with the same counts: those of all before the span."""
LARGEST_LOG = 20.0
"""Most nats that a token is thought to be more or less likely than 1."""


class ModelArgs:
    """What fixes the architecture, from ``config.json``."""

    def __init__(self, config: dict[str, Any]) -> None:
        architecture: dict[str, Any] = config["architecture"]
        self.vocab_size: int = config["vocab_size"]
        self.dim: int = architecture["dim"]
        self.heads: int = architecture["heads"]
        self.ffn_dim: int = architecture["ffn_dim"]
        self.conv_width: int = architecture["conv_width"]
        self.tie_embeddings: bool = architecture["tie_embeddings"]
        self.beta_max = 2.0 if architecture.get("negative_eigenvalues", False) else 1.0
        self.count_half_lives: list[float] = architecture.get("count_half_lives", [])
        kinds = architecture["memories"]
        self.layer_types: list[str] = [kinds[number % len(kinds)] for number in range(architecture["layers"])]

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Return the arguments that ``config`` has, as mlx-lm asks for them."""
        return cls(config)


class LayerState:
    """What a layer knows of the tokens before.

    Attributes:
        state: the last C - 1 inputs of its convolution [B, C - 1, channels], and the state of its recurrence. Of
            counts of tokens: see :meth:`TokenCounts.zero_state`.
    """

    def __init__(self, past: mx.array, memory: mx.array) -> None:
        self.state = [past, memory]

    def is_trimmable(self) -> bool:
        """Return False: what was read cannot be taken out again."""
        return False

    @property
    def nbytes(self) -> int:
        """The size of the state."""
        return sum(part.nbytes for part in self.state)


class CausalConv(nn.Module):
    """Depth-wise convolution over the last C tokens."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, width))

    def __call__(self, x: mx.array, past: mx.array) -> tuple[mx.array, mx.array]:
        length, width = x.shape[1], self.weight.shape[1]
        seen = mx.concatenate([past, x], axis=1)
        y = seen[:, :length] * self.weight[:, 0]
        for tap in range(1, width):
            y = y + seen[:, tap : tap + length] * self.weight[:, tap]
        return y, seen[:, length:]


class RGLRU(nn.Module):
    """The "short" layer: D numbers that fade at input-dependent rates, the RG-LRU of Griffin (De et al. 2024)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        dim = args.dim
        self.project = nn.Linear(dim, 4 * dim, bias=False)
        self.conv = CausalConv(dim, args.conv_width)
        self.r_bias, self.i_bias, self.rate = mx.zeros(dim), mx.zeros(dim), mx.zeros(dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def zero_state(self, rows: int) -> LayerState:
        channels, width = self.conv.weight.shape
        return LayerState(mx.zeros((rows, width - 1, channels)), mx.zeros((rows, channels)))

    def __call__(self, x: mx.array, before: LayerState) -> mx.array:
        past, memory = before.state
        values, r, i, gate = mx.split(self.project(x), 4, axis=-1)
        values, past = self.conv(values, past)
        log_decay = -8 * _softplus(self.rate) * mx.sigmoid(r + self.r_bias)
        inputs = mx.sqrt(1e-8 - mx.expm1(2 * log_decay)) * mx.sigmoid(i + self.i_bias) * values
        decay = mx.exp(log_decay)
        outputs = []
        for place in range(x.shape[1]):
            memory = decay[:, place] * memory + inputs[:, place]
            outputs.append(memory)
        before.state = [past, memory]
        y: mx.array = self.output(mx.stack(outputs, axis=1) * mx.sigmoid(gate))
        return y


class GatedDeltaNet(nn.Module):
    """The "long" layer: per head a matrix that is told what to hold for a key (Yang, Kautz, Hatamizadeh 2024)."""

    gate_rank = 16

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.beta_max = args.heads, args.beta_max
        self._make_gates(args)
        self.conv = CausalConv(3 * args.dim, args.conv_width)
        self.log_rate, self.decay_bias = mx.zeros(args.heads), mx.zeros(args.heads)
        self.norm = nn.RMSNorm(args.dim // args.heads, NORM_EPSILON)
        self.output = nn.Linear(args.dim, args.dim, bias=False)

    def _make_gates(self, args: ModelArgs) -> None:
        self.project = nn.Linear(args.dim, 3 * args.dim + 2 * args.heads + self.gate_rank, bias=False)
        self.beta_bias = mx.zeros(args.heads)
        self.gate = nn.Linear(self.gate_rank, args.dim, bias=False)

    def zero_state(self, rows: int) -> LayerState:
        channels, width = self.conv.weight.shape
        size = channels // 3 // self.heads
        return LayerState(mx.zeros((rows, width - 1, channels)), mx.zeros((rows, self.heads, size, size)))

    def __call__(self, x: mx.array, before: LayerState) -> mx.array:
        past, memory = before.state
        rows, length, dim = x.shape
        ends = [3 * dim, 3 * dim + self.heads, 3 * dim + 2 * self.heads]
        qkv, decay, beta, gate = mx.split(self.project(x), ends, axis=-1)
        qkv, past = self.conv(qkv, past)
        qkv = nn.silu(qkv).reshape(rows, length, 3, self.heads, -1)
        q, k, v = self._scaled(_unit(qkv[:, :, 0])), _unit(qkv[:, :, 1]), qkv[:, :, 2]
        decay = mx.exp(-mx.exp(self.log_rate) * _softplus(decay + self.decay_bias))[..., None, None]
        beta = self.beta_max * self._write_gate(beta)[..., None, None]
        outputs = []
        for place in range(length):  # of each head [K, V]: decays, is corrected, and is then read
            key = k[:, place, :, :, None]
            memory = decay[:, place] * memory
            predicted = key.swapaxes(-1, -2) @ memory
            memory = memory + key @ (beta[:, place] * (v[:, place, :, None] - predicted))
            outputs.append(q[:, place, :, None] @ memory)
        before.state = [past, memory]
        o = self.norm(mx.stack(outputs, axis=1)).reshape(rows, length, dim)
        y: mx.array = self.output(o * self._output_gate(gate))
        return y

    def _scaled(self, q: mx.array) -> mx.array:
        return q

    def _write_gate(self, beta: mx.array) -> mx.array:
        return mx.sigmoid(beta + self.beta_bias)

    def _output_gate(self, gate: mx.array) -> mx.array:
        opening: mx.array = mx.sigmoid(self.gate(gate))
        return opening


class PortableGatedDeltaNet(GatedDeltaNet):
    """The "portable" layer: the long one with the published gates."""

    def _make_gates(self, args: ModelArgs) -> None:
        self.project = nn.Linear(args.dim, 4 * args.dim + 2 * args.heads, bias=False)

    def _scaled(self, q: mx.array) -> mx.array:
        scale: float = q.shape[-1] ** -0.5
        return q * scale

    def _write_gate(self, beta: mx.array) -> mx.array:
        return mx.sigmoid(beta)

    def _output_gate(self, gate: mx.array) -> mx.array:
        return gate * mx.sigmoid(gate)


LAYER_TYPES: dict[str, Any] = {"short": RGLRU, "long": GatedDeltaNet, "portable": PortableGatedDeltaNet}


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.project = nn.Linear(args.dim, 2 * args.ffn_dim, bias=False)
        self.output = nn.Linear(args.ffn_dim, args.dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = mx.split(self.project(x), 2, axis=-1)
        y: mx.array = self.output(value * nn.silu(gate))
        return y


class Block(nn.Module):
    """A recurrent layer and a feed-forward network, each normalized before and added to the residual stream."""

    def __init__(self, args: ModelArgs, kind: str) -> None:
        super().__init__()
        self.memory_norm = nn.RMSNorm(args.dim, NORM_EPSILON)
        self.memory = LAYER_TYPES[kind](args)
        self.ffn_norm = nn.RMSNorm(args.dim, NORM_EPSILON)
        self.ffn = FeedForward(args)

    def __call__(self, x: mx.array, before: LayerState) -> mx.array:
        x = x + self.memory(self.memory_norm(x), before)
        y: mx.array = x + self.ffn(self.ffn_norm(x))
        return y


class TokenCounts(nn.Module):
    """R decayed counts of each token, which make what a text uses more likely (Kuhn and De Mori 1990)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.half_lives = tuple(args.count_half_lives)  # no list: MLX would look for weights in it
        self.strength = mx.zeros((len(self.half_lives), args.vocab_size))
        self.log_frequency = mx.zeros(args.vocab_size)
        self.gate = nn.Linear(args.dim, len(self.half_lives))

    def zero_state(self, rows: int) -> LayerState:
        """Return the state before the first token: tokens of the span that was begun [B, SPAN], and counts [B, R, N].

        Each token stands there plus 1, 0 where there is none yet. One below 0 has its place, and is not counted.
        """
        return LayerState(mx.zeros((rows, SPAN)), mx.zeros((rows, *self.strength.shape)))

    def __call__(self, tokens: mx.array, x: mx.array, before: LayerState) -> mx.array:
        """Count ``tokens`` [B, T]; return what is added to the logits [B, T, N] where ``x`` [B, T, D] gives them."""
        pending, counts = before.state
        rows, length = tokens.shape
        phase = mx.sum(pending != 0, axis=1, keepdims=True)
        place, ended = phase + mx.arange(length), (phase + length) // SPAN
        spans = (SPAN - 1 + length) // SPAN  # that may end here
        read = mx.concatenate([pending, mx.zeros((rows, spans * SPAN))], axis=1)
        read = mx.put_along_axis(read, place, (tokens + 1).astype(read.dtype), axis=1).reshape(rows, -1, SPAN)
        evidence = [self._evidence(counts)]
        for span in range(spans):
            counts = mx.where((ended > span)[..., None], self._after_span(counts, read[:, span]), counts)
            evidence.append(self._evidence(counts))
        before.state = [mx.take_along_axis(read, ended[..., None], axis=1)[:, 0], counts]
        begun = mx.stack(evidence[: (SPAN - 2 + length) // SPAN + 1], axis=1)  # spans that a token may stand in
        gates = 2 * mx.sigmoid(self.gate(x))
        added = gates[:, :, None] @ mx.take_along_axis(begun, (place // SPAN)[..., None, None], axis=1)
        return added.squeeze(2)

    def _after_span(self, counts: mx.array, read: mx.array) -> mx.array:
        """Return ``counts`` [B, R, N] after a whole span, of which ``read`` [B, SPAN] is as in the state."""
        half_lives = mx.array(self.half_lives)[:, None]
        added = 2 ** (-mx.arange(SPAN - 1, -1, -1) / half_lives) * (read > 0)[:, None]
        places = mx.arange(len(read))[:, None, None], mx.arange(len(half_lives))[:, None]
        token = mx.clip(read - 1, 0, counts.shape[-1] - 1).astype(mx.int32)[:, None]
        return (counts * 2 ** (-SPAN / half_lives)).at[*places, token].add(added)

    def _evidence(self, counts: mx.array) -> mx.array:
        """Return what ``counts`` [B, R, N] add to the logits, before the gates."""
        scaled = counts / mx.array(self.half_lives)[:, None]
        relative = scaled * mx.exp(-mx.clip(self.log_frequency, -LARGEST_LOG, LARGEST_LOG))
        return self.strength * (mx.log1p(relative) - mx.log1p(mx.sum(scaled, axis=-1, keepdims=True)))


class Model(nn.Module):
    """The language model: tokens and a state in, logits out."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embedding = nn.Embedding(args.vocab_size, args.dim)
        self.blocks = [Block(args, kind) for kind in args.layer_types]
        self.norm = nn.RMSNorm(args.dim, NORM_EPSILON)
        if not args.tie_embeddings:
            self.head = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.count_half_lives:
            self.counts = TokenCounts(args)

    @property
    def layers(self) -> list[Block]:
        """The blocks, by the name that mlx-lm knows them by."""
        return self.blocks

    def make_cache(self, rows: int = 1) -> list[LayerState]:
        """Return the state before the first token of ``rows`` texts."""
        cache: list[LayerState] = [block.memory.zero_state(rows) for block in self.blocks]
        return [*cache, self.counts.zero_state(rows)] if "counts" in self else cache

    def __call__(self, tokens: mx.array, cache: list[LayerState] | None = None) -> mx.array:
        """Read tokens and predict, after each, the next one.

        Args:
            tokens: [B, T], integers from 0 to N - 1; others are not found out.
            cache: what was read before, from :meth:`make_cache`; it is changed. None: nothing was.

        Returns:
            Logits [B, T, N], float32.
        """
        cache = self.make_cache(len(tokens)) if cache is None else cache
        x = self.embedding(tokens)
        for block, before in zip(self.blocks, cache[: len(self.blocks)], strict=True):
            x = block(x, before)
        x = self.norm(x)
        logits: mx.array = self.head(x) if "head" in self else self.embedding.as_linear(x)
        return logits + self.counts(tokens, x, cache[-1]) if "counts" in self else logits


def _softplus(x: mx.array) -> mx.array:
    return mx.logaddexp(x, 0)


def _unit(x: mx.array) -> mx.array:
    """Return ``x`` with its last dimension brought to length 1."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + 1e-6)


def load(folder: str | Path) -> tuple[Model, Any]:
    """Return the model and the tokenizer, of the library tokenizers, that stand in ``folder``."""
    from tokenizers import Tokenizer

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = Model(ModelArgs(config))
    model.load_weights(str(Path(folder) / "model.safetensors"))
    return model, Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))


def generate(model: Model, prompt: Sequence[int], length: int, temperature: float = 0.0) -> Iterator[int]:
    """Yield ``length`` tokens that follow those of ``prompt``.

    Args:
        model: the model.
        prompt: tokens, at least one.
        length: how many to write.
        temperature: 0 chooses the likeliest token, 1 draws from what the model predicts.

    Raises:
        ValueError: the prompt is empty or has a token of no model's, or the temperature is below 0.
    """
    size = model.embedding.weight.shape[0]
    if not prompt or not all(0 <= token < size for token in prompt):
        raise ValueError(f"the prompt has to be tokens from 0 to {size - 1}, at least one")
    if not temperature >= 0:
        raise ValueError(f"the temperature is {temperature}; it must be at least 0")
    cache = model.make_cache()
    for begin in range(0, len(prompt), READ_CHUNK):
        logits = model(mx.array([prompt[begin : begin + READ_CHUNK]]), cache)[0, -1]
        mx.eval(logits, [layer.state for layer in cache])
    state = [layer.state for layer in cache]

    def step(token: mx.array, state: list[list[mx.array]]) -> tuple[mx.array, list[list[mx.array]]]:
        cache = [LayerState(*layer) for layer in state]
        return model(token[None, None], cache)[0, -1], [layer.state for layer in cache]

    compiled = mx.compile(step)
    for _ in range(length):
        token = mx.random.categorical(logits / temperature) if temperature else mx.argmax(logits)
        chosen = token.item()
        assert isinstance(chosen, int)
        yield chosen
        logits, state = compiled(token, state)


def main() -> None:
    """Write text after a prompt."""
    parser = argparse.ArgumentParser(description="Writes text after a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--length", type=int, default=200, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 chooses the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    given = parser.parse_args()
    mx.random.seed(given.seed)
    model, tokenizer = load(Path(__file__).parent)
    try:
        prompt = tokenizer.encode(given.prompt).ids
        print(tokenizer.decode([*prompt, *generate(model, prompt, given.length, given.temperature)]))
    except Exception as error:  # the library's own, of a character without a token, and of an empty prompt
        parser.error(str(error))


if __name__ == "__main__":
    main()
