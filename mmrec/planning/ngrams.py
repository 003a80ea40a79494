"""What an n-gram model makes of a text: the yardstick of what can be reached of it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 5
"""Tokens before each that the longest n-grams look at."""

Codes = NDArray[np.uint64]
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def ngram_bits_per_token(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Return the bits per token of ``val`` by the best of the n-gram models of orders 0 to :data:`MAX_ORDER`.

    The models are counted in ``train`` and interpolated from the shorter ones as Witten and Bell 1991 do ("The
    zero-frequency problem"): p = (c(context, token) + u p') / (c(context) + u), with u the number of different tokens
    after the context and p' of the context without its first token.

    Args:
        train: [n] tokens.
        val: [m] tokens, m at least 1.
        vocab_size: number of different tokens.
    """
    probability = np.full(len(val), 1 / vocab_size)
    joined = np.concatenate([train[-MAX_ORDER:], val])
    begin = len(joined) - len(val)
    best = math.log2(vocab_size)
    for order in range(min(MAX_ORDER, len(train) - 1) + 1):
        contexts, ngrams = _codes(train, order)
        asked_contexts, asked_ngrams = (codes[begin - order :] for codes in _codes(joined, order))
        different, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
        total = _lookup(*np.unique(contexts, return_counts=True), asked_contexts)
        types = _lookup(*np.unique(contexts[first], return_counts=True), asked_contexts)
        seen = total > 0
        found = _lookup(different, counts, asked_ngrams)
        probability[seen] = ((found + types * probability) / np.maximum(total + types, 1))[seen]
        best = min(best, abs(float(np.log2(probability).mean())))  # 0.0, not -0.0, of a text that is certain
    return best


def _codes(tokens: np.ndarray, order: int) -> tuple[Codes, Codes]:
    """Return codes of the ``order`` tokens before each token that has so many, and of those with the token."""
    count = len(tokens) - order
    contexts = np.zeros(count, dtype=np.uint64)
    for place in range(order):
        contexts = _appended(contexts, tokens[place : place + count])
    return contexts, _appended(contexts, tokens[order:])


def _appended(codes: Codes, tokens: np.ndarray) -> Codes:
    """Return the codes with one more token each: a hash of 64 bits, whose collisions do not matter."""
    mixed = (codes ^ (tokens.astype(np.uint64) + np.uint64(1))) * MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def _lookup(keys: Codes, counts: np.ndarray, asked: Codes) -> NDArray[np.float64]:
    """Return the count of each code that is asked for; 0 where there is none."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, counts[place], 0).astype(np.float64)
