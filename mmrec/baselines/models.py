"""The models that are compared: each reads tokens and a state, and returns logits and the state after them.

Legend of shapes as in :mod:`mmrec.model`. All have about 0.8 million parameters, as nanoGPT's CPU preset, so
that tokens per second are compared at equal size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.core.errors import UserError, nearest
from mmrec.model import ModelConfig, RecurrentLM


class GPT(nn.Module):
    """nanoGPT's architecture (pre-norm, GELU, no biases, learned positions, tied embedding) with torch's attention.

    Args:
        vocab_size: N.
        positions: longest text, in tokens; its table is not counted, as nanoGPT does not.
        dim: D.
        layers: number of layers.
        heads: H.
        bias: whether linear maps and norms have one, as GPT-2's do.
    """

    def __init__(
        self, vocab_size: int, positions: int, dim: int = 128, layers: int = 4, heads: int = 4, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(positions, dim)
        self.blocks = nn.ModuleList(GPTBlock(dim, heads, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.apply(self._initialize)
        for name, parameter in self.named_parameters():
            if name.endswith("output.weight"):
                nn.init.normal_(parameter, std=0.02 * (2 * layers) ** -0.5)
        self.head.weight = self.tokens.weight

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def zero_state(self, rows: int, capacity: int = 0) -> Cache:
        """Return an empty cache for ``capacity`` tokens."""
        dim, device = self.tokens.weight.shape[1], self.tokens.weight.device
        size = (len(self.blocks), 2, rows, self.heads, capacity, dim // self.heads)
        return Cache(torch.zeros(size, device=device), 0)

    def forward(self, tokens: Tensor, state: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """[B, T] to logits [B, T, N]; without a state nothing is kept, as in training."""
        start = state.length if state is not None else 0
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for index, block in enumerate(self.blocks):
            x = block(x, state.memory[index] if state is not None else None, start)
        after = None if state is None else Cache(state.memory, start + tokens.shape[1])
        return self.head(self.norm(x)), after


@dataclass
class Cache:
    """Keys and values that were read: [layers, 2, B, H, capacity, D / H], of which ``length`` count."""

    memory: Tensor
    length: int


class GPTBlock(nn.Module):
    """Attention and a feed-forward network, each normalized before and added to the stream."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim, bias=bias)
        self.project = nn.Linear(dim, 3 * dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)
        self.ffn_norm = nn.LayerNorm(dim, bias=bias)
        self.ffn = nn.ModuleDict({"input": nn.Linear(dim, 4 * dim, bias=bias)})
        self.ffn["output"] = nn.Linear(4 * dim, dim, bias=bias)

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        rows, length, dim = x.shape
        parts = self.project(self.attention_norm(x)).view(rows, length, 3, self.heads, dim // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, start : start + length], cache[1, :, :, start : start + length] = k, v
            k, v = cache[:, :, :, : start + length]
        # From an empty past the mask is the causal triangle; a single token may see all there is.
        mask = None
        if start and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=start == 0 and length > 1)
        x = x + self.output(y.transpose(1, 2).reshape(rows, length, dim))
        out: Tensor = x + self.ffn["output"](F.gelu(self.ffn["input"](self.ffn_norm(x))))
        return out


class LSTM(nn.Module):
    """Some layers of ``torch.nn.LSTM`` with a tied embedding."""

    def __init__(self, vocab_size: int, dim: int, layers: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.tokens = nn.Embedding(vocab_size, dim)
        self.lstm = nn.LSTM(dim, dim, num_layers=layers, batch_first=True)
        self.head = nn.Linear(dim, vocab_size)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)

    def zero_state(self, rows: int) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(self.lstm.num_layers, rows, self.dim, device=self.tokens.weight.device)
        return zero, zero

    def forward(self, tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, state = self.lstm(self.tokens(tokens), state)
        return self.head(x), state


class Wrapped(nn.Module):
    """A model of another package, trained on windows: tokens to logits, without a state that could be carried.

    Args:
        model: of tokens [B, T] to logits [B, T, N].
        chunk: T has to be a multiple of it; other texts are filled up behind, where nothing looks back from.
    """

    def __init__(self, model: nn.Module, chunk: int = 1) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk

    def zero_state(self, rows: int) -> None:
        return None

    def forward(self, tokens: Tensor, state: None) -> tuple[Tensor, None]:
        padding = -tokens.shape[1] % self.chunk
        output = self.model(F.pad(tokens, (0, padding)) if padding else tokens)
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        return logits[:, : tokens.shape[1]] if padding else logits, None


def _mmrec(vocab_size: int, length: int) -> nn.Module:
    return RecurrentLM(ModelConfig(layer_types=("short", "long", "short", "short"), ffn_dim=304), vocab_size)


def mingru(vocab_size: int, dim: int, layers: int) -> nn.Module:
    """Return minGRU-pytorch's language model (Feng et al. 2024)."""
    module: Any = import_module("minGRU_pytorch.minLM")
    return Wrapped(module.minLM(num_tokens=vocab_size, dim=dim, depth=layers))


def _titans(vocab_size: int, length: int) -> nn.Module:
    module: Any = import_module("titans_pytorch")
    sizes = {"dim": 76, "depth": 4, "heads": 4, "dim_head": 20, "segment_len": 64}
    return Wrapped(module.MemoryAsContextTransformer(num_tokens=vocab_size, **sizes))


def _xlstm(vocab_size: int, length: int) -> nn.Module:
    module: Any = import_module("xlstm.xlstm_large.model")
    kernels = {
        "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native",
        "step_kernel": "native",
        "autocast_kernel_dtype": "float32",
    }
    sizes = {"embedding_dim": 128, "num_heads": 4, "num_blocks": 4, "vocab_size": vocab_size}
    config = module.xLSTMLargeConfig(**sizes, **kernels, return_last_states=True)
    return Wrapped(module.xLSTMLarge(config), chunk=config.chunk_size)


def mamba(vocab_size: int, dim: int, layers: int) -> nn.Module:
    """Return transformers' Mamba (Gu and Dao 2023), by its path for a CPU."""
    module: Any = import_module("transformers")
    sizes = {"vocab_size": vocab_size, "hidden_size": dim, "num_hidden_layers": layers}
    return Wrapped(module.MambaForCausalLM(module.MambaConfig(**sizes, use_cache=False)))


def mamba2(vocab_size: int, dim: int, layers: int) -> nn.Module:
    """Return transformers' Mamba-2 (Dao and Gu 2024), by its path for a CPU."""
    module: Any = import_module("transformers")
    # Heads of 64 channels, as published, or somewhat wider where the width is no multiple of 32.
    heads = next(count for count in range(max(1, 2 * dim // 64), 0, -1) if 2 * dim % count == 0)
    sizes = {"vocab_size": vocab_size, "hidden_size": dim, "num_hidden_layers": layers, "num_heads": heads}
    inner = {"head_dim": 2 * dim // heads, "state_size": 64, "n_groups": 1, "chunk_size": 64}
    return Wrapped(module.Mamba2ForCausalLM(module.Mamba2Config(**sizes, **inner, use_cache=False)))


def _rwkv(vocab_size: int, length: int) -> nn.Module:
    module: Any = import_module("transformers")
    sizes = {"vocab_size": vocab_size, "hidden_size": 122, "num_hidden_layers": 4, "context_length": length}
    return Wrapped(module.RwkvForCausalLM(module.RwkvConfig(**sizes, use_cache=False)))


@dataclass(frozen=True)
class Baseline:
    """One model to compare.

    Attributes:
        about: what it is, for a person.
        build: makes it of (vocabulary, longest text in tokens).
        package: import name that it needs, if any.
    """

    about: str
    build: Callable[[int, int], nn.Module]
    package: str | None = None


BASELINES: dict[str, Baseline] = {
    "mmrec": Baseline("this program's model", _mmrec),
    "gpt": Baseline("nanoGPT's shape, torch's scaled_dot_product_attention", GPT),
    "lstm": Baseline("torch.nn.LSTM, 2 layers", lambda vocab_size, _: LSTM(vocab_size, 221)),
    "mingru": Baseline("minGRU-pytorch's minLM", lambda vocab_size, _: mingru(vocab_size, 124, 4), "minGRU_pytorch"),
    "titans": Baseline("titans-pytorch's MemoryAsContextTransformer", _titans, "titans_pytorch"),
    "xlstm": Baseline("xlstm's xLSTMLarge, its kernels in torch", _xlstm, "xlstm"),
    "mamba": Baseline("HF Mamba, its CPU path", lambda vocab_size, _: mamba(vocab_size, 168, 4), "transformers"),
    "mamba2": Baseline("HF Mamba-2, its CPU path", lambda vocab_size, _: mamba2(vocab_size, 168, 4), "transformers"),
    "rwkv": Baseline("HF RWKV-4, its CPU path", _rwkv, "transformers"),
}


def size(model: nn.Module) -> int:
    """Return the number of parameters without a table of positions."""
    table = getattr(model, "positions", None)
    return sum(p.numel() for p in model.parameters()) - (table.weight.numel() if table is not None else 0)


def check_baseline(name: str) -> Baseline:
    """Return the baseline ``name``; UserError where there is none, or its package is missing."""
    if name not in BASELINES:
        raise UserError(f"no baseline {name!r}; known: {', '.join(BASELINES)}{nearest(name, BASELINES)}")
    baseline = BASELINES[name]
    if baseline.package is not None and find_spec(baseline.package) is None:
        raise UserError(f"the baseline {name} needs a package that is not installed; pip install 'mmrec[bench]'")
    return baseline


def make_baseline(name: str, vocab_size: int, length: int) -> nn.Module:
    """Return the baseline ``name`` for texts of up to ``length`` tokens."""
    return check_baseline(name).build(vocab_size, length)
