"""Exact counts of the n-grams that were read, in a hash table of fixed size."""

from __future__ import annotations

import numpy as np
import torch

from mmrec.checkpoints.cached import HISTORY, NO_TOKEN, ORDERS
from mmrec.model.ops import dispatch
from mmrec.model.ops.native.ngrams import CompiledNgrams, Hashing

LARGEST_COUNT = 63
COUNT_BITS = 6
LARGEST_CHECK = 1023
"""Of a slot of 16 bits: the check tells apart what may share a slot, the count is 0 where it is empty."""
PROBES = 8
"""Slots that a token after a context may lie in."""
LONGEST_SHORT, SHORT_SHARE = 3, 8
"""Contexts of up to so many tokens lie in the first of so many parts of the table."""
_COUNT_MASK = np.uint16(LARGEST_COUNT)


class NgramCache:
    """Counts of each token after each context of the lengths :data:`ORDERS`, as read so far.

    A slot of the table holds a check and a count. The tokens after a context lie side by side, from a slot on that
    the context's hash gives, each in one of the :data:`PROBES` slots from its own on; so one look-up finds all of
    them. Where all those slots are taken, the entry with the lowest count loses one, and its slot when it has none
    left: the table never grows, and what is rare is forgotten first. At the largest count, all counts of a context
    are halved.

    Where there are compiled kernels they count and look up, with the same counts and the same table to the bit.

    Args:
        table: [S], uint16, changed in place by :meth:`update`.
        vocab_size: N, of the tokens.
    """

    def __init__(self, table: np.ndarray, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._take(table)
        checks, tokens = np.arange(LARGEST_CHECK)[:, None], np.arange(vocab_size)
        # The check of each token after a context, in its place in a slot; it is never 0.
        self._entries = ((checks + 37 * tokens) % LARGEST_CHECK + 1 << COUNT_BITS).astype(np.uint16)
        # Short contexts have many tokens after them; apart, they do not fill the slots of the long ones.
        is_short, short = np.array(ORDERS)[:, None] <= LONGEST_SHORT, len(self._rows) // SHORT_SHARE
        self._begins = np.where(is_short, 0, short).astype(np.uint64)
        self._spans = np.where(is_short, short - PROBES, len(self._rows) - short).astype(np.uint64)
        # The same for ever: a table that was saved is read by them.
        self._factors = _scattered(np.arange(1, HISTORY + 1, dtype=np.uint64)) | np.uint64(1)
        self._salts = _scattered(np.arange(1, len(ORDERS) + 1, dtype=np.uint64) << np.uint64(32))[:, None]
        self._hashing = Hashing(ORDERS, self._factors, self._salts, self._begins, self._spans)

    def _take(self, table: np.ndarray) -> None:
        self.table = table
        self._made: CompiledNgrams | None = None
        self._rows = np.lib.stride_tricks.sliding_window_view(table, self.vocab_size + PROBES - 1)

    def copy_table(self) -> np.ndarray:
        """Read and change a copy of the table from now on; return it."""
        self._take(self.table.copy())
        return self.table

    @property
    def compiled(self) -> CompiledNgrams | None:
        """What counts and looks up by compiled code; None where there is none, or none is wanted."""
        if not dispatch.has_native_learning() or not self._hashing.takes(self.vocab_size):
            return None
        if self._made is None:
            self._made = CompiledNgrams(self.table, self.vocab_size, self._hashing)
        return self._made

    def counts(self, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return how often each token followed the contexts before each of ``tokens``, and before the one after them.

        Those among ``tokens`` count for the positions behind them, too; the table is not changed.

        Args:
            history: [HISTORY], the tokens before.
            tokens: [T], int64.

        Returns:
            [K, T + 1, N], float32, of the K orders, each of which knows the tokens alone that the shorter ones know.
        """
        if compiled := self.compiled:
            return compiled.counts(torch.from_numpy(history), torch.from_numpy(tokens)).numpy()
        hashes = self._hashes(history, tokens)
        starts, checks = self._places(hashes)
        entries = self._entries[checks]
        rows = self._rows[starts]
        known = rows[..., : self.vocab_size] ^ entries  # below 64, the count, where the check is the same
        for probe in range(1, PROBES):
            np.minimum(known, rows[..., probe : probe + self.vocab_size] ^ entries, out=known)
        known[known > LARGEST_COUNT] = 0
        for longer, shorter in zip(known[1:], known, strict=False):
            longer[shorter == 0] = 0  # another context's, by chance
        counts: np.ndarray = known.astype(np.float32)
        if len(tokens):
            earlier = np.tri(len(tokens) + 1, len(tokens), -1, dtype=bool)
            same = (hashes[:, :, None] == hashes[:, None, :-1]) & earlier
            seen = np.zeros((len(tokens), self.vocab_size), dtype=np.float32)
            seen[np.arange(len(tokens)), tokens] = 1
            counts += same.astype(np.float32) @ seen
        return counts

    def followers(self, history: np.ndarray, number: int) -> np.ndarray:
        """Return which tokens followed the context before the next one of the order of that ``number``, [N], bool.

        Unlike in :meth:`counts`, those too that the shorter orders do not know, whose slots may have made room. By
        chance it is another context's: about one look-up in a thousand.

        Args:
            history: [HISTORY], the tokens before.
            number: of the order, in :data:`ORDERS`.
        """
        starts, checks = self._places(self._hashes(history, history[:0]))
        row = self._rows[starts[number, 0]]
        slots = np.lib.stride_tricks.sliding_window_view(row, self.vocab_size)
        found: np.ndarray = ((slots ^ self._entries[checks[number, 0]]) <= LARGEST_COUNT).any(0)
        return found

    def update(self, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Count ``tokens`` [T] after the contexts before them; return the history after them."""
        if compiled := self.compiled:
            compiled.count(torch.from_numpy(history), torch.from_numpy(tokens))
            return extended_history(history, tokens)
        starts, checks = self._places(self._hashes(history, tokens)[:, :-1])
        entries = self._entries[checks, tokens].astype(np.int64)
        wanted = (starts + tokens).ravel() << 16 | entries.ravel()
        wanted, first, counted = np.unique(wanted, return_index=True, return_counts=True)
        for index in self._count(wanted >> 16, (wanted & 0xFFFF).astype(np.uint16), counted):
            self._halve(int(starts.ravel()[first[index]]), int(checks.ravel()[first[index]]))
        return extended_history(history, tokens)

    def _count(self, slots: np.ndarray, entries: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Count each entry so often, in one of the slots from its own on; return which are at the largest count."""
        full = np.zeros(len(slots), dtype=bool)
        left = np.arange(len(slots))
        while len(left):
            window = slots[left, None] + np.arange(PROBES)
            found = self.table[window]
            counts = found & _COUNT_MASK
            known = (found ^ entries[left, None]) <= LARGEST_COUNT
            # The slot that has the entry, else the one with the lowest count, of those the first.
            choice = np.where(known, -1, counts.astype(np.int64)).argmin(1)
            rows = np.arange(len(left))
            target, count, is_known = window[rows, choice], counts[rows, choice].astype(np.int64), known[rows, choice]
            _, winners = np.unique(target, return_index=True)  # the others look again
            target, count, is_known, indices = target[winners], count[winners], is_known[winners], left[winners]
            new = np.where(is_known, count + counted[indices], counted[indices]).clip(max=LARGEST_COUNT)
            takes = is_known | (count <= counted[indices])
            self.table[target] = np.where(takes, entries[indices] | new.astype(np.uint16), self.table[target] - 1)
            full[indices] = takes & (new == LARGEST_COUNT)
            left = np.delete(left, winners)
        return np.flatnonzero(full)

    def _halve(self, start: int, check: int) -> None:
        """Halve the counts of the tokens after a context."""
        slots = start + np.arange(self.vocab_size)[:, None] + np.arange(PROBES)
        entries = self._entries[check][:, None]
        counts = self.table[slots] ^ entries
        mine = counts <= LARGEST_COUNT
        self.table[slots[mine]] = (np.broadcast_to(entries, slots.shape) | counts + 1 >> 1)[mine]

    def _hashes(self, history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the hash of the contexts before each token and before the next one, [K, T + 1], uint64."""
        text = (np.concatenate([history, tokens]) - NO_TOKEN).astype(np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(text, HISTORY)[:, ::-1]
        sums = (windows * self._factors).cumsum(axis=1, dtype=np.uint64)
        hashes = sums[:, [order - 1 for order in ORDERS]].T + self._salts
        return _scattered(hashes)

    def _places(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the tokens after a context begin in the table, and its check."""
        starts = (hashes >> np.uint64(16)) % self._spans + self._begins
        return starts.astype(np.int64), (hashes % np.uint64(LARGEST_CHECK)).astype(np.int64)


def _scattered(numbers: np.ndarray) -> np.ndarray:
    """Return what looks like random numbers, uint64: the output function of SplitMix64 (Steele et al. 2014)."""
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


def new_history() -> np.ndarray:
    """Return the last tokens before a text, [HISTORY], int64: none."""
    return np.full(HISTORY, NO_TOKEN, dtype=np.int64)


def extended_history(history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the last tokens [HISTORY] of ``history`` and the ``tokens`` [T] after it."""
    return np.concatenate([history, tokens])[-HISTORY:]
