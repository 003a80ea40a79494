"""What generates, token by token: the one place that chooses a decoder, and mixtures of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mmrec.inference.cached_reading import CachedGenerating
from mmrec.inference.learning import mixed
from mmrec.model import RecurrentLM, State
from mmrec.model.captured import CapturedDecoder
from mmrec.model.decode import Decoder


class TokenDecoder(Protocol):
    """Reads one token of each of B texts at a time."""

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read a token of each text; return the logits of the next ones [B, N], which the next call may overwrite."""


class StateDecoder(TokenDecoder, Protocol):
    """A decoder whose state can be taken out, and replaced."""

    def state(self) -> State:
        """Return a copy of the states after the last tokens."""

    def set_state(self, state: State) -> None:
        """Go on from another state, of as many texts. It is not changed."""


CAPTURE_PAYS = 64
"""Tokens from which on a CUDA graph is captured, which takes about as long as so many steps without one."""


def make_decoder(net: RecurrentLM, state: State, tokens: int) -> StateDecoder:
    """Return the fastest decoder for the device of ``net`` and the numbers on it.

    Args:
        net: the model, in evaluation mode.
        state: to go on from, of B texts.
        tokens: number of steps that will be made, about.
    """
    weight = net.embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return Decoder(net, state)
    return CapturedDecoder(net, state) if weight.is_cuda and tokens >= CAPTURE_PAYS else ModuleDecoder(net, state)


class ModuleDecoder:
    """The decoder of any device and precision, by the model's own ``forward``."""

    def __init__(self, net: RecurrentLM, state: State) -> None:
        self._net, self._state = net, state

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read a token of each text; return the logits of the next ones [B, N]."""
        given = torch.tensor(tokens, device=self._net.embedding.weight.device)
        logits: Tensor
        logits, self._state = self._net(given[:, None], self._state)
        return logits[:, -1]

    def state(self) -> State:
        """Return the states after the last tokens."""
        return self._state

    def set_state(self, state: State) -> None:
        """Go on from another state."""
        self._state = state


class MixedDecoder:
    """A mixture of the model as it was trained and of what it has learned, by fixed weights, for one text.

    Args:
        mix: [2], their weights.
        decoders: of the model as it was trained, and of the model with what it has learned.
    """

    def __init__(self, mix: Tensor, *decoders: TokenDecoder) -> None:
        self._mix, self._decoders = mix, decoders

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read the one token; return the logits of the next one [1, N]."""
        return mixed(torch.stack([decoder.step(tokens) for decoder in self._decoders]), self._mix)


class CachedDecoder:
    """A mixture of models with what the n-grams that were read predict, for one text.

    Args:
        generating: the n-grams.
        decoders: of the models: of the one that learned, if it did, and of the untouched one.
    """

    def __init__(self, generating: CachedGenerating, *decoders: TokenDecoder) -> None:
        self._generating, self._decoders = generating, decoders

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read the one token; return the logits of the next one [1, N], none of which makes a run too long."""
        self._generating.push(tokens[0])
        logits = torch.cat([decoder.step(tokens) for decoder in self._decoders])
        return self._generating.mixed(logits.log_softmax(-1))[None]
