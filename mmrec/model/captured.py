"""A step of one token in buffers that stay where they are, as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrec.core.errors import one_line
from mmrec.model.lm import RecurrentLM
from mmrec.model.state import State

WARM_UP = 3
"""Steps before a capture: kernels are compiled and libraries take their memory in the first ones."""


class StaticStep:
    """One token of B texts: tokens in, states changed in place, logits out, all at addresses that never change.

    Args:
        net: the model, in evaluation mode.
        rows: number of texts, B.

    Attributes:
        tokens: [B, 1], int64, that the next step reads; the caller writes them.
        state: of the texts.
        logits: [B, N], of the tokens after those.
    """

    @torch.inference_mode()
    def __init__(self, net: RecurrentLM, rows: int) -> None:
        weight = net.embedding.weight
        self._net, self._graph = net, None
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=weight.device)
        self.state = net.zero_state(rows)
        self.logits = torch.zeros(rows, len(net.head.weight), device=weight.device, dtype=weight.dtype)
        if weight.is_cuda:
            self._graph = self._captured()

    @torch.inference_mode()
    def set_state(self, state: State) -> None:
        """Go on from another state, of as many texts. It is not changed."""
        for layer, given in zip(self.state, state, strict=True):
            for kept, new in zip(layer, given, strict=True):
                kept.copy_(new)

    @property
    def is_captured(self) -> bool:
        """Whether a step is one launch."""
        return self._graph is not None

    @torch.inference_mode()
    def compute(self) -> None:
        """Make a step, operation by operation."""
        logits, after = self._net(self.tokens, self.state)
        self.logits.copy_(logits[:, 0])
        self.set_state(after)

    def run(self) -> None:
        """Make a step: by the graph, where there is one."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self.compute()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Return the graph of a step; None, and a line that says so, where this device or a kernel cannot do it."""
        side = torch.cuda.Stream(self.tokens.device)
        side.wait_stream(torch.cuda.current_stream(self.tokens.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.compute()
        torch.cuda.current_stream(self.tokens.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
                self.compute()
        except RuntimeError as error:
            print(f"generating without a CUDA graph: {one_line(error)[:200]}", file=sys.stderr)
            return None
        return graph


class CapturedDecoder:
    """:class:`mmrec.model.decode.Decoder` for a CUDA device.

    Args:
        net: the model, in evaluation mode.
        state: of B texts. It is not changed.
    """

    def __init__(self, net: RecurrentLM, state: State) -> None:
        self._step = StaticStep(net, len(state[0][0]))
        self.set_state = self._step.set_state
        self.set_state(state)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Read a token of each text; return the logits of the next ones [B, N], which the next call overwrites."""
        self._step.tokens.copy_(torch.tensor(tokens)[:, None])
        self._step.run()
        return self._step.logits

    @torch.inference_mode()
    def state(self) -> State:
        """Return a copy of the states after the last tokens."""
        return [(past.clone(), memory.clone()) for past, memory in self._step.state]
