"""Decayed counts of the tokens that were read, which make predictions of what a text uses more likely.

A cache language model (Kuhn and De Mori 1990, "A Cache-Based Natural Language Model for Speech Recognition") as a
recurrent state that is trained with the model. Counts are added up after every :data:`SPAN` tokens of a text: what
they add to the logits is then a product of few factors, instead of a number for each token of the vocabulary at each
place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmrec.model.state import LayerState

SPAN = 32
"""Tokens that are predicted with the same counts: those of all before the span."""
INITIAL_STRENGTH = 0.4
LARGEST_LOG = 20.0
"""Most nats that a token is thought to be more or less likely than 1."""
READ_BEFORE = -1
"""In the place of a token that was read before the state was reset."""


class CountFeatures(NamedTuple):
    """What counts say at each place of a batch.

    Attributes:
        evidence: [B, K, R, N], float32, added to the logits of the places of each of K spans, times the gates.
        phase: [B], int64, tokens of the first span that were read before the batch.
        known: [B, T], float32, 0 from a reset on to the end of its span, where nothing was counted, and 1 elsewhere;
            None without resets.
    """

    evidence: Tensor
    phase: Tensor
    known: Tensor | None

    def narrow(self, start: int, length: int) -> CountFeatures:
        """Return what belongs to ``length`` tokens from ``start`` on, a multiple of :data:`SPAN`."""
        first, last = start // SPAN, -(-(start + length) // SPAN) + 1
        known = None if self.known is None else self.known.narrow(1, start, length)
        return CountFeatures(self.evidence[:, first:last], self.phase, known)


class TokenCounts(nn.Module):
    """R decayed counts of each token, and what they add to the logits.

    To the logit of token n is added, for each count, ``gate(x) * s[n] * log((c[n] / (H u[n]) + 1) / (w / H + 1))``:
    c[n] the count with half-life H, w the sum of c, u[n] about how often the token occurs elsewhere, s[n] a strength.

    Args:
        dim: D.
        vocab_size: N.
        half_lives: H of each count, in tokens, [R].
    """

    def __init__(self, dim: int, vocab_size: int, half_lives: Sequence[float]) -> None:
        super().__init__()
        self.half_lives = half_lives
        self.strength = nn.Parameter(torch.full((len(half_lives), vocab_size), INITIAL_STRENGTH))
        self.log_frequency = nn.Parameter(torch.full((vocab_size,), 1 / vocab_size).log())
        self.gate = nn.Linear(dim, len(half_lives))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def _half_lives(self, like: Tensor) -> Tensor:
        """Return the half-lives as a tensor [R], filled in on the device: a copy could not be captured in a graph."""
        return torch.stack([torch.full((), each, dtype=like.dtype, device=like.device) for each in self.half_lives])

    def zero_state(self, rows: int, device: torch.device) -> LayerState:
        """Return the state before the first token of ``rows`` texts, float32.

        That is the tokens of the span that was begun [rows, SPAN], each plus 1, 0 where there is none yet; and the
        counts [rows, R, N].
        """
        counts = torch.zeros(rows, *self.strength.shape, device=device)
        return torch.zeros(rows, SPAN, device=device), counts

    def read(
        self, tokens: Tensor, state: LayerState, reset_mask: Tensor | None = None
    ) -> tuple[CountFeatures, LayerState]:
        """Count ``tokens`` [B, T]; return what the counts say at each of them, and the state after the last one.

        The state is zero before each token where ``reset_mask`` [B, T] is true; what is read after it is counted from
        the end of the span on that it stands in.
        """
        pending, counts = state
        rows, length = tokens.shape
        phase = (pending != 0).sum(1)
        place = phase[:, None] + torch.arange(length, device=tokens.device)
        spans = (SPAN - 1 + length) // SPAN  # that may end here
        read = torch.cat([pending, pending.new_zeros(rows, spans * SPAN)], 1)
        read = read.scatter(1, place, tokens.to(pending.dtype) + 1).view(rows, -1, SPAN)
        keep = known = None
        if reset_mask is not None:
            resets = torch.zeros_like(read, dtype=torch.bool).flatten(1)
            resets = resets.scatter(1, place, reset_mask).view(read.shape)
            to_come = resets.flip(2).cumsum(2).flip(2) - resets.to(torch.int64)  # resets after each place of a span
            read = read.masked_fill((to_come > 0) & (read > 0), READ_BEFORE)
            keep = ~resets.any(2)
            known = (resets.cumsum(2) == 0).flatten(1).gather(1, place).to(counts.dtype)
        ended = (phase + length) // SPAN
        tokens, added = self._added_by(read)
        decay, at_span = self._decay(counts), [counts]
        for span in range(spans):
            if keep is not None:
                counts = counts * keep[:, span, None, None]
            after = _after(counts, decay, tokens[:, span], added[:, span])
            counts = torch.where((ended > span)[:, None, None], after, counts)
            at_span.append(counts)
        if keep is not None:
            counts = counts * keep[:, spans, None, None]
        pending = read.gather(1, ended[:, None, None].expand(-1, 1, SPAN))[:, 0]
        return CountFeatures(self.evidence(torch.stack(at_span, 1)), phase, known), (pending, counts)

    def after_span(self, counts: Tensor, read: Tensor) -> Tensor:
        """Return ``counts`` [B, R, N] after a whole span, of which ``read`` [B, SPAN] is as in the state."""
        tokens, added = self._added_by(read[:, None])
        return _after(counts, self._decay(counts), tokens[:, 0], added[:, 0])

    @torch.no_grad()
    def _added_by(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens that were ``read`` [B, K, SPAN], and what they add to the counts at the end of each span.

        Both are [B, K, R, SPAN]. Of a token that occurs several times each place has the sum, so that it does not
        matter which of them is written.
        """
        age = torch.arange(SPAN - 1, -1, -1, device=read.device)
        token, is_counted = (read - 1).clamp(min=0).to(torch.int64), read > 0
        same = (token[..., None] == token[..., None, :]) & is_counted[..., None, :]
        weights = torch.exp2(-age[:, None] / self._half_lives(read))
        added = (same[..., None] * weights).sum(-2).mT
        return token[..., None, :].expand(added.shape), added

    def _decay(self, like: Tensor) -> Tensor:
        """Return what a span leaves of the counts, [R, 1]."""
        return torch.exp2(-SPAN / self._half_lives(like))[:, None]

    def evidence(self, counts: Tensor) -> Tensor:
        """Return what ``counts`` [B, K, R, N] add to the logits, before the gates."""
        scaled = counts / self._half_lives(counts)[:, None]
        relative = scaled * torch.exp(-self.log_frequency.clamp(-LARGEST_LOG, LARGEST_LOG))
        return self.strength * (relative.log1p() - scaled.sum(-1, keepdim=True).log1p())

    def add(self, logits: Tensor, hidden: Tensor, features: CountFeatures) -> Tensor:
        """Return ``logits`` [B, T, N], which are changed, with what the counts add where ``hidden`` is [B, T, D]."""
        length = logits.shape[1]
        gates = 2 * self.gate(hidden).sigmoid()
        if features.known is not None:
            gates = gates * features.known[..., None]
        # A stretch of SPAN places has the end of one span, and the begin of the next one.
        place = torch.arange(length, device=logits.device) % SPAN
        is_first = (place < (SPAN - features.phase)[:, None])[..., None]
        gates = torch.cat([gates * is_first, gates * ~is_first], -1)
        evidence = torch.cat([features.evidence[:, :-1], features.evidence[:, 1:]], 2)
        factors = gates.to(logits.dtype), evidence.to(logits.dtype)
        if not torch.is_grad_enabled():
            return _add_product(logits, *factors)
        added: Tensor = _AddProduct.apply(logits, *factors)
        return added

    def added(self, hidden: Tensor, features: CountFeatures) -> Tensor:
        """Return what the counts add to the logits [B, T, N], where ``hidden`` is [B, T, D]."""
        return self.add(hidden.new_zeros(*hidden.shape[:2], len(self.log_frequency)), hidden, features)


@torch.no_grad()
def _after(counts: Tensor, decay: Tensor, tokens: Tensor, added: Tensor) -> Tensor:
    """Return ``counts`` [B, R, N] after a span that adds ``added`` to those of ``tokens``, both [B, R, SPAN]."""
    counts = counts * decay
    return counts.scatter(2, tokens, counts.gather(2, tokens) + added)


def _add_product(logits: Tensor, gates: Tensor, evidence: Tensor) -> Tensor:
    """Add to ``logits`` [B, T, N], in place, ``gates`` [B, T, G] times ``evidence`` [B, stretches of T, G, N]."""
    for added, *factors in _stretches(logits, gates, evidence):
        added.baddbmm_(*factors)
    return logits


class _AddProduct(torch.autograd.Function):
    """:func:`_add_product`: autograd's own in views of one tensor would copy the gradient of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gates: Tensor, evidence: Tensor) -> Tensor:
        ctx.save_for_backward(gates, evidence)
        ctx.mark_dirty(logits)
        return _add_product(logits, gates, evidence)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad, factors = grad.contiguous(), ctx.saved_tensors
        to_gates, to_evidence = (torch.zeros_like(factor) for factor in factors)
        saved, found = (_stretches(grad, *each) for each in (factors, (to_gates, to_evidence)))
        for (from_above, gate, said), (_, to_gate, to_said) in zip(saved, found, strict=True):
            to_gate.baddbmm_(from_above, said.mT)
            to_said.baddbmm_(gate.mT, from_above)
        return grad, to_gates, to_evidence


def _stretches(logits: Tensor, gates: Tensor, evidence: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the arguments of :func:`_add_product`, [any, ...]: of whole stretches, and of the last one."""
    length = logits.shape[1]
    whole, both = length // SPAN * SPAN, (logits, gates)
    if whole == length:
        yield *(x.view(-1, SPAN, x.shape[-1]) for x in both), evidence.flatten(0, 1)
        return
    for row in range(len(logits) if whole else 0):
        yield *(x[row, :whole].view(-1, SPAN, x.shape[-1]) for x in both), evidence[row, :-1]
    yield *(x[:, whole:] for x in both), evidence[:, -1]
