"""Reading with a cache of n-grams: what it expects, mixed with what the models expect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmrec.checkpoints.cached import DAMPING, MODELS, ORDERS, CachedNgrams
from mmrec.checkpoints.learned import PART
from mmrec.inference.mixing import FORGETTING, features, mix, updated_weights
from mmrec.inference.ngram_cache import NgramCache, extended_history, new_history
from mmrec.model.ops.native.ngrams import NgramMixing

NEVER = -1e30
"""Logit of a token that is not allowed; a number, so that it can be written wherever log-probabilities are."""
_RULE = NgramMixing(FORGETTING, DAMPING)


class CachedReading:
    """Reads on from a cache of n-grams, beside the models: no token is counted or learned from before it is scored.

    Args:
        ngrams: what was read before; it is not changed.
        vocab_size: N, of the tokens.
    """

    def __init__(self, ngrams: CachedNgrams, vocab_size: int) -> None:
        self.ngrams, self._has_copied = ngrams, False
        self._cache = NgramCache(ngrams.table.numpy().view(np.uint16), vocab_size)

    def expected(self, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is mixed, as :func:`mmrec.inference.mixing.features` does.

        Args:
            scores: [m, T + 1, N], log-probabilities of each of the part's tokens and of the next one, by what the
                model has learned and by the untouched model, or by the one model that there is.
            tokens: [T], int64, of the part, from its beginning on.
        """
        counts = self._cache.counts(self.ngrams.history.numpy(), tokens.numpy())
        return features(scores.expand(MODELS, -1, -1), torch.from_numpy(counts))

    def read(self, logits: Tensor, tokens: Tensor, scored: slice, is_whole: bool) -> Tensor:
        """Read a part, from its beginning on; count and learn where it is whole.

        Args:
            logits: [m, T + 1, N], of the models as :meth:`expected` takes them.
            tokens: [T], int64, of the part, from its beginning on.
            scored: those of them that something could predict.
            is_whole: whether the part ends here.

        Returns:
            The log-probabilities [T, N] of the mixture.
        """
        device, tokens = tokens.device, tokens.cpu()
        learned_from = slice(scored.start if is_whole else len(tokens), len(tokens))
        mixed, weights, curvature = self._mixed(logits.float().cpu(), tokens, learned_from)
        if not is_whole:
            self.ngrams = replace(self.ngrams, tokens=tokens)
            return mixed.to(device)
        if not self._has_copied:  # of many MiB, and most readings end before they count
            table = torch.from_numpy(self._cache.copy_table().view(np.int16))
            self.ngrams, self._has_copied = replace(self.ngrams, table=table), True
        history = torch.from_numpy(self._cache.update(self.ngrams.history.numpy(), tokens.numpy()))
        self.ngrams = replace(self.ngrams, history=history, tokens=tokens[:0], weights=weights, curvature=curvature)
        return mixed.to(device)

    def _mixed(self, logits: Tensor, tokens: Tensor, learned_from: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixture [T, N], and the weights and their curvature after some of the part's tokens."""
        weights, curvature = self.ngrams.weights, self.ngrams.curvature
        if compiled := self._cache.compiled:
            before, models = (self.ngrams.history, tokens), (logits[0, :-1], logits[-1, :-1])
            return compiled.mix(_RULE, before, models, weights, curvature, learned_from.start)
        weighed, sets = self.expected(logits.log_softmax(-1), tokens)
        mixed = mix(weights, weighed[:, :-1], sets[:-1])
        if learned_from.start < len(tokens):
            weighed, sets = weighed[:, learned_from], sets[learned_from]
            weights, curvature = updated_weights(weights, curvature, weighed, sets, tokens[learned_from])
        return mixed, weights, curvature


def with_counted(ngrams: CachedNgrams, texts: Iterable[np.ndarray], vocab_size: int) -> CachedNgrams:
    """Return ``ngrams`` after the tokens of ``texts`` [T] were counted, which no model read; it is not changed."""
    table = ngrams.table.clone()
    cache, history = NgramCache(table.numpy().view(np.uint16), vocab_size), new_history()
    for tokens in texts:
        for begin in range(0, len(tokens), PART):
            history = cache.update(history, tokens[begin : begin + PART].astype(np.int64))
    return replace(ngrams, table=table, history=torch.from_numpy(history))


class HeldBack:
    """All of a text but for its last tokens, piece by piece; the last ones are there when it has ended.

    Args:
        texts: pieces [T] of the text.
        parts: how many whole parts of :data:`PART` tokens are held back, or fewer of a shorter text.

    Attributes:
        held: [n] tokens that were held back, a multiple of :data:`PART` at the end.
    """

    def __init__(self, texts: Iterable[np.ndarray], parts: int) -> None:
        self.held = np.zeros(0, dtype=np.int64)
        self._texts, self._most = texts, parts * PART

    def __iter__(self) -> Iterator[np.ndarray]:
        for tokens in self._texts:
            yield self._cut(np.concatenate([self.held, tokens]), self._most)
        yield self._cut(self.held, len(self.held) // PART * PART)

    def _cut(self, tokens: np.ndarray, held: int) -> np.ndarray:
        """Hold the last ``held`` of ``tokens`` back; return the others."""
        begin = max(0, len(tokens) - held)
        self.held = tokens[begin:]
        return tokens[:begin]


class CachedGenerating:
    """What a cache adds to the predictions of models while text is generated; what is generated is not counted.

    Args:
        ngrams: what was read before.
        vocab_size: N, of the tokens.
        verbatim: no token is allowed that would follow this many tokens as it followed them in what was read.
    """

    def __init__(self, ngrams: CachedNgrams, vocab_size: int, verbatim: int) -> None:
        self._cache = NgramCache(ngrams.table.numpy().view(np.uint16), vocab_size)
        self._weights, self._order = ngrams.weights, bounding_order(verbatim)
        self._before = ngrams.history.numpy()
        if len(ngrams.tokens):
            self._cache.copy_table()
            self._before = self._cache.update(self._before, ngrams.tokens.numpy())

    def mixed(self, scores: Tensor) -> Tensor:
        """Return the log-probabilities [N] of the next token, :data:`NEVER` of those that are not allowed.

        Args:
            scores: [m, N], log-probabilities of the models, as :meth:`CachedReading.expected` takes them.
        """
        counts = torch.from_numpy(self._cache.counts(self._before, self._before[:0]))
        weighed, sets = features(scores.float().cpu()[:, None].expand(MODELS, -1, -1), counts)
        found = mix(self._weights, weighed, sets)[0]
        recited = torch.from_numpy(self._cache.followers(self._before, self._order))
        return (found if bool(recited.all()) else found.masked_fill(recited, NEVER)).to(scores.device)

    def push(self, token: int) -> None:
        """Take ``token`` as the next one."""
        self._before = extended_history(self._before, np.array([token]))


def bounding_order(verbatim: int) -> int:
    """Return the number of the longest contexts that are not longer than ``verbatim``, in :data:`ORDERS`."""
    return max(number for number, order in enumerate(ORDERS) if order <= verbatim)
