"""Reference forms of the operations, written for clarity: every fast form is tested against these.

The letters of dimensions are those of :mod:`mmrec.model`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LRU_EPSILON = 1e-8
"""Added to 1 - a^2 of the RG-LRU."""
RESET_LOG_DECAY = -30.0
"""Logarithm of a decay that leaves nothing in float32, and small enough for sums of many to stay exact."""


def rg_lru(
    r: Tensor, i: Tensor, z: Tensor, rate: Tensor, state: Tensor, reset_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RG-LRU: ``h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(i_t) z_t``, ``a_t = exp(-rate sigmoid(r_t))``.

    The real-gated linear recurrent unit of Griffin (De et al. 2024, section 2.4); its code scales the first input
    after a reset by 1 instead of sqrt(1 - a_t^2). The gates do not read the state, so the recurrence is linear in it.

    Args:
        r: [B, T, D], the recurrence gate, before its sigmoid.
        i: [B, T, D], the input gate, before its sigmoid.
        z: [B, T, D], the inputs.
        rate: [D], not negative: the decay of an open gate, in nats a token.
        state: [B, D], before the first token.
        reset_mask: [B, T], bool: tokens before which the state is set to zero; none if left out.

    Returns:
        The state after each token [B, T, D] and after the last one [B, D].
    """
    outputs = []
    log_decay = -rate * r.sigmoid()
    # 1 - a^2 by expm1: exact where a is close to 1; the epsilon keeps the root's gradient finite.
    inputs = (LRU_EPSILON - torch.expm1(2 * log_decay)).sqrt() * i.sigmoid() * z
    decay = log_decay.exp() if reset_mask is None else log_decay.exp().masked_fill(reset_mask.unsqueeze(-1), 0)
    for t in range(z.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule: a matrix per head that decays, is corrected, and is then read, at every token.

    ``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`` and ``o_t = S_t^T q_t``, with a = exp(log_decay)
    and b = beta: Gated Delta Networks (Yang, Kautz, Hatamizadeh 2024, equation 10).

    Args:
        q: [B, H, T, K], the queries.
        k: [B, H, T, K], the keys, of unit length.
        v: [B, H, T, V], the values.
        log_decay: [B, H, T], natural logarithm of the decay, at most 0.
        beta: [B, H, T], the writing strength: how far the state moves towards the new value, in 0..2. 1 puts it
            there, 2 as far beyond (the transition then has a negative eigenvalue; Grazzi et al. 2024).
        state: [B, H, K, V], before the first token.

    Returns:
        The outputs [B, H, T, V] and the state after the last token [B, H, K, V].
    """
    outputs = []
    for t in range(q.shape[2]):
        k_t, b_t = k[:, :, t], beta[:, :, t, None]
        state = state * log_decay[:, :, t, None, None].exp()
        predicted = torch.einsum("bhkv,bhk->bhv", state, k_t)
        correction = b_t * (v[:, :, t] - predicted)
        state = state + k_t.unsqueeze(-1) * correction.unsqueeze(-2)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, dim=2), state


class DeltaGates(NamedTuple):
    """What the gates of the gated delta rule are made of.

    Attributes:
        decay: [B, T, H], before its bias and softplus.
        beta: [B, T, H], before its bias and sigmoid.
        log_rate: [H]: the decay is ``-exp(log_rate)`` times the softplus.
        decay_bias: [H].
        beta_bias: [H], or None.
    """

    decay: Tensor
    beta: Tensor
    log_rate: Tensor
    decay_bias: Tensor
    beta_bias: Tensor | None


def delta_gates(given: DeltaGates, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the log-decay, and the writing strength as a share of its maximum: [B, T, H], in ``dtype``."""
    log_decay = -given.log_rate.exp() * F.softplus(given.decay.to(dtype) + given.decay_bias)
    beta = given.beta.to(dtype) if given.beta_bias is None else given.beta.to(dtype) + given.beta_bias
    return log_decay, beta.sigmoid()


def apply_reset(log_decay: Tensor, reset_mask: Tensor | None) -> Tensor:
    """Return ``log_decay`` [B, T, any] with all forgotten at the tokens where ``reset_mask`` [B, T] is true."""
    return log_decay if reset_mask is None else log_decay.masked_fill(reset_mask.unsqueeze(-1), RESET_LOG_DECAY)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys of any length, and values: [B, H, T, K], of a convolution's ``qkv`` [B, T, 3 H K]."""
    rows, length, _ = qkv.shape
    q, k, v = F.silu(qkv).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return q, k, v


def l2_normalize(x: Tensor) -> Tensor:
    """Return ``x`` with its last dimension brought to length 1."""
    # The epsilon stands inside the root: a zero vector then has a finite gradient.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def causal_conv(x: Tensor, past: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Depth-wise convolution over the last C tokens: ``y_t = sum_i weight_i * x_{t - C + 1 + i}``.

    Args:
        x: [B, T, channels].
        past: [B, C - 1, channels], the inputs before the first token.
        weight: [channels, C]; the last column is that of the token itself.

    Returns:
        [B, T, channels], and the last C - 1 inputs.
    """
    seen = torch.cat([past, x], dim=1)
    y = F.conv1d(seen.mT, weight.unsqueeze(1), groups=weight.shape[0]).mT
    return y, seen[:, x.shape[1] :]


def swiglu(x: Tensor) -> Tensor:
    """The gated unit of Shazeer (2020): [..., 2F] to [..., F], the first half times the SiLU of the second."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.silu(gate)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalization (Zhang and Sennrich 2019) over the last dimension, scaled by ``weight`` [D]."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
