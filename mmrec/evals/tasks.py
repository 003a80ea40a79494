"""Synthetic tasks whose answers follow from what was read: recall, and state tracking.

A task makes rows of tokens and, at the query positions, the token that answers; everywhere else the target is
:data:`mmrec.data.batches.IGNORE_INDEX`. Every row of a batch has as many queries. Legend of shapes: B rows, T tokens.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mmrec.data.batches import IGNORE_INDEX

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, [B, T] int64 both."""


class Task(ABC):
    """One task at any level of difficulty.

    Attributes:
        about: what it is, for a person.
        unit: what a level counts.
        accuracy_of: what accuracy counts: "each" answer, "whole" rows, or the "last" answer of each row.
        vocab_size: N.
    """

    about: ClassVar[str]
    unit: ClassVar[str]
    accuracy_of: ClassVar[Literal["each", "whole", "last"]] = "each"
    vocab_size: int

    @abstractmethod
    def length(self, level: int) -> int:
        """Return the tokens of a row."""

    @abstractmethod
    def chance(self, level: int) -> float:
        """Return the accuracy of guessing among the answers that are possible."""

    @abstractmethod
    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets [B, T], int64."""

    def batch(self, random: np.random.Generator, rows: int, level: int) -> Batch:
        """Return :meth:`make`'s rows as tensors."""
        inputs, targets = self.make(random, rows, level)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def accuracy(self, correct: Tensor) -> float:
        """Return the accuracy, of ``correct`` [B, answers of a row], bool."""
        match self.accuracy_of:
            case "whole":
                correct = correct.all(-1)
            case "last":
                correct = correct[:, -1]
        return float(correct.double().mean())


def _sample_distinct(random: np.random.Generator, rows: int, of: int, count: int) -> np.ndarray:
    """Return [B, count] different numbers below ``of`` in each row, in random order."""
    drawn = random.random((rows, of), dtype=np.float32)
    return drawn.argpartition(count - 1, axis=1)[:, :count] if count < of else drawn.argsort(axis=1)


def _ignored_targets(rows: int, length: int) -> np.ndarray:
    return np.full((rows, length), IGNORE_INDEX, dtype=np.int64)


class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023), in the setting of zoology's Figure 2.

    Pairs of a key and a value, all different, then every key once more among zeros: the next token is its value. The
    gap from the pairs to a key's query follows a power law. Keys are the tokens from 1 on below N / 2, values
    those from N / 2 on.

    Args:
        vocab_size: N.
        tokens_of_a_pair: T / pairs; from 4 on, every second place is a query.
        power: exponent of the law of gaps; 1 is uniform.
    """

    about = "multi-query associative recall"
    unit = "pairs"

    def __init__(self, vocab_size: int = 8192, tokens_of_a_pair: int = 4, power: float = 0.01) -> None:
        self.vocab_size, self.tokens_of_a_pair, self.power = vocab_size, tokens_of_a_pair, power

    def length(self, level: int) -> int:
        return level * self.tokens_of_a_pair

    def chance(self, level: int) -> float:
        return 1 / level

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        half, length = self.vocab_size // 2, self.length(level)
        keys = 1 + _sample_distinct(random, rows, half - 1, level)
        values = half + _sample_distinct(random, rows, half, level)
        places = (length - 2 * level) // 2
        weight = np.arange(1, places + 1) ** (self.power - 1)
        # The largest of logarithm plus Gumbel noise: drawn by weight, one after the other, none twice.
        gumbel = np.log(weight) + random.gumbel(size=(rows, places))
        queries = 2 * level + 2 * gumbel.argsort(axis=1)[:, ::-1][:, :level]
        inputs, targets = np.zeros((rows, length), dtype=np.int64), _ignored_targets(rows, length)
        inputs[:, 0 : 2 * level : 2], inputs[:, 1 : 2 * level : 2] = keys, values
        np.put_along_axis(inputs, queries, keys, axis=1)
        np.put_along_axis(targets, queries, values, axis=1)
        return inputs, targets


class Passkey(Task):
    """Five digits after a mark somewhere in a text of random letters and digits; at the end the mark queries them.

    Args:
        letters: how many letters the text is made of, beside the digits.
    """

    about = "five digits, hidden once in a text"
    unit = "tokens"
    accuracy_of = "whole"
    DIGITS, KEY_LENGTH = 10, 5

    def __init__(self, letters: int = 26) -> None:
        self.vocab_size = self.DIGITS + letters + 1
        self.mark = self.vocab_size - 1

    def length(self, level: int) -> int:
        return level

    def chance(self, level: int) -> float:
        share: float = self.DIGITS**-self.KEY_LENGTH
        return share

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = random.integers(self.mark, size=(rows, level))
        targets = _ignored_targets(rows, level)
        key = random.integers(self.DIGITS, size=(rows, self.KEY_LENGTH))
        first = random.integers(level - 2 * self.KEY_LENGTH - 1, size=(rows, 1))
        np.put_along_axis(inputs, first, self.mark, axis=1)
        np.put_along_axis(inputs, first + 1 + np.arange(self.KEY_LENGTH), key, axis=1)
        inputs[:, -self.KEY_LENGTH] = self.mark
        inputs[:, level - self.KEY_LENGTH + 1 :] = key[:, :-1]
        targets[:, -self.KEY_LENGTH :] = key
        return inputs, targets


class KeyValue(Task):
    """Values that are set again and again: a row of "key value", then queries for the last value of each key.

    Args:
        keys: how many keys there are; all are set at least once, and queried in random order.
        values: how many values there are.
    """

    about = "the last of several values of a key"
    unit = "assignments"

    def __init__(self, keys: int = 16, values: int = 64) -> None:
        self.keys, self.values = keys, values
        self.vocab_size = keys + values

    def length(self, level: int) -> int:
        return 2 * level + 2 * self.keys

    def chance(self, level: int) -> float:
        return self.keys / level  # any of the values that were set for the key

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = np.empty((rows, self.length(level)), dtype=np.int64)
        targets = _ignored_targets(*inputs.shape)
        keys = random.integers(self.keys, size=(rows, level))
        for row in keys:  # every key once, at places of its own
            row[random.choice(level, self.keys, replace=False)] = np.arange(self.keys)
        values = random.integers(self.values, size=(rows, level))
        last = np.empty((rows, self.keys), dtype=np.int64)
        for at in range(level):
            last[np.arange(rows), keys[:, at]] = values[:, at]
        queries = _sample_distinct(random, rows, self.keys, self.keys)
        answers = np.take_along_axis(last, queries, axis=1)
        inputs[:, 0 : 2 * level : 2], inputs[:, 1 : 2 * level : 2] = keys, self.keys + values
        inputs[:, 2 * level :: 2], inputs[:, 2 * level + 1 :: 2] = queries, self.keys + answers
        targets[:, 2 * level :: 2] = self.keys + answers
        return inputs, targets


class Copy(Task):
    """A row of random symbols, a mark, and the row once more."""

    about = "a row of random symbols, once more"
    unit = "symbols"

    def __init__(self, symbols: int = 32) -> None:
        self.symbols, self.vocab_size = symbols, symbols + 1

    def length(self, level: int) -> int:
        return 2 * level

    def chance(self, level: int) -> float:
        return 1 / self.symbols

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        text = random.integers(self.symbols, size=(rows, level))
        mark = np.full((rows, 1), self.symbols)
        inputs = np.concatenate([text, mark, text[:, :-1]], axis=1)
        targets = _ignored_targets(rows, 2 * level)
        targets[:, level:] = text
        return inputs, targets


class Induction(Task):
    """A mark stands in random symbols; at the end it queries what came after it (Gu and Dao 2023, 4.1.2)."""

    about = "what came after the mark"
    unit = "tokens"

    def __init__(self, symbols: int = 16) -> None:
        self.symbols, self.vocab_size = symbols, symbols + 1

    def length(self, level: int) -> int:
        return level

    def chance(self, level: int) -> float:
        return 1 / self.symbols

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = random.integers(self.symbols, size=(rows, level)), _ignored_targets(rows, level)
        first = random.integers(level - 2, size=(rows, 1))
        np.put_along_axis(inputs, first, self.symbols, axis=1)
        targets[:, -1] = np.take_along_axis(inputs, first + 1, axis=1)[:, 0]
        inputs[:, -1] = self.symbols
        return inputs, targets


class Parity(Task):
    """Bits; after each, the parity of the ones so far. Every position is a query, the last answer counts."""

    about = "the parity of the ones so far"
    unit = "bits"
    accuracy_of = "last"
    vocab_size = 2

    def length(self, level: int) -> int:
        return level

    def chance(self, level: int) -> float:
        return 0.5

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = random.integers(2, size=(rows, level))
        return inputs, inputs.cumsum(axis=1) % 2


PERMUTATIONS = np.array(list(itertools.permutations(range(5))))
"""The 120 elements of S5, in the order of their numbers."""
SWAPS = np.flatnonzero((np.arange(5) != PERMUTATIONS).sum(axis=1) == 2)
"""The numbers of the 10 that exchange two things."""


class S5(Task):
    """Permutations of five things; after each, what all so far make together. The last answer counts.

    The word problem of S5 is beyond what a fixed number of layers of a diagonal recurrence can do (Merrill et al.
    2024). The gated delta rule makes one reflection a token: a swap, not any permutation (Grazzi et al. 2024).

    Args:
        steps: "swaps" of two things, or "all" permutations.
    """

    about = "the product of permutations of five things"
    unit = "permutations"
    accuracy_of = "last"
    vocab_size = len(PERMUTATIONS)

    def __init__(self, steps: Literal["swaps", "all"] = "swaps") -> None:
        self.choices = SWAPS if steps == "swaps" else np.arange(len(PERMUTATIONS))
        weights = 5 ** np.arange(5)
        numbers = np.empty(5**5, dtype=np.int64)
        numbers[PERMUTATIONS @ weights] = np.arange(len(PERMUTATIONS))
        self.products = numbers[PERMUTATIONS[:, PERMUTATIONS] @ weights]  # [a, b]: first b, then a

    def length(self, level: int) -> int:
        return level

    def chance(self, level: int) -> float:
        # An even number of swaps makes an even permutation.
        return (2 if self.choices is SWAPS else 1) / len(PERMUTATIONS)

    def make(self, random: np.random.Generator, rows: int, level: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = random.choice(self.choices, size=(rows, level))
        targets = inputs.copy()
        for at in range(1, level):
            targets[:, at] = self.products[inputs[:, at], targets[:, at - 1]]
        return inputs, targets
