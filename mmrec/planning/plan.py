"""The plan of a training: which model, which batches, how many updates, how much against overfitting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.law import LAW, Law, likely_range

SHAPES = (
    ModelConfig(dim=64, layers=3, layer_types=("short", "long", "short"), heads=2, ffn_dim=128),
    ModelConfig(dim=128, layers=4, layer_types=("short", "long", "short", "short"), heads=4, ffn_dim=256),
    ModelConfig(dim=192, layers=4, layer_types=("short", "long", "short", "short"), heads=4, ffn_dim=384),
    ModelConfig(dim=256, layers=4, layer_types=("short", "long", "short", "short"), heads=4, ffn_dim=512),
    ModelConfig(dim=256, layers=8, layer_types=("short", "long"), heads=8, ffn_dim=640),
    ModelConfig(dim=384, layers=6, layer_types=("short", "long"), heads=6, ffn_dim=1024),
    ModelConfig(dim=768, layers=12, layer_types=("short", "long"), heads=12, ffn_dim=2048),
)
"""The models that a plan chooses from, the smallest first; the second and the last two are those of ``quickstart``,
``mini`` and ``small``. Four layers of which one is long train faster than as many parameters in eight of which four
are, as in ``tiny`` (docs/planning-study.md)."""
MOST_PARAMETERS_OF_SMALL_BATCHES = 4_000_000
"""Of the layers."""
MANY_TOKENS, FEW_EPOCHS = 4_000_000, 8
"""Tokens of a training from which on small models have twice the rows, of a text that is read so often at most
(docs/planning-study.md)."""
HALF_LIVES = (256.0, 4096.0)
"""Tokens, of the counts of a model whose tokens are words and parts of words."""
LARGEST_ALPHABET = 512
"""Different characters up to which each is a token; where there are more tokens, they are words or parts of words."""
DROPOUT = ((0.1, 13.0), (0.2, 40.0), (0.3, 70.0))
"""Shares of dropout, each with what of :func:`regularization` it begins at; those that did best in
docs/planning-study.md."""
DROPOUT_OF_WORDS = ((0.05, 5.0), (0.1, 10.0), (0.2, 40.0), (0.3, 70.0))
"""The same for words and parts of words as tokens: a text has fewer of them, and is learned by heart sooner."""
MOST_EPOCHS = 30
"""A text is not read more often, however much time there is: it was learned by heart by then
(docs/planning-study.md)."""
MOST_EXPECTED = 8.0
"""Bits per byte: nobody needs more, and what a law says of a few updates may be beyond."""
SHORTEST_ROW = 16
"""Tokens of a row of a short text."""
MOST_VALIDATIONS = 20
VALIDATION_SHARE = 0.06
"""Most of the time that all validations of a training may take."""
FORWARD_SHARE = 0.5
"""Of an update's time, what scoring as many tokens takes."""
VALIDATION_SECONDS = 0.25
"""Of a validation, for what does not depend on its tokens: two checkpoints, a sample, Lightning's loop."""


@dataclass(frozen=True)
class Text:
    """What a plan knows of a prepared text.

    Attributes:
        train_tokens: tokens that train.
        val_tokens: tokens that validate.
        vocab_size: number of different tokens.
        bytes_per_token: of the validation text.
        xz: bits per byte that xz makes of the validation text after the training text.
        ngram: the same by an n-gram model.
    """

    train_tokens: int
    val_tokens: int
    vocab_size: int
    bytes_per_token: float
    xz: float
    ngram: float


@dataclass(frozen=True)
class Batches:
    """What an update trains on.

    Attributes:
        rows: sequences.
        seq_len: tokens of a row.
        interleave: streams in turn.
        copies: processes that each have so many rows of their own, as several GPUs do.
    """

    rows: int
    seq_len: int
    interleave: int
    copies: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of an update, of all copies."""
        return self.copies * self.rows * self.seq_len

    def share(self, processes: int) -> Batches:
        """Return what each of ``processes`` has of the rows."""
        return replace(self, rows=self.rows // processes)


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, and what is expected of it.

    Attributes:
        config: of the model.
        batches: of each update.
        steps: updates.
        text: what is read.
        expected: bits per byte on the validation text.
        spread: what its logarithm is not off by, two times of three.
        processes: that share out the rows of an update.
        rate: tokens that are trained on in a second; 0 where that is not known.
    """

    config: ModelConfig
    batches: Batches
    steps: int
    text: Text
    expected: float
    spread: float
    processes: int = 1
    rate: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens read in all."""
        return self.steps * self.batches.tokens

    @property
    def epochs(self) -> float:
        """How often the training text is read."""
        return self.tokens / self.text.train_tokens

    def describe(self, seconds: float, rest: float) -> str:
        """Return the plan for a person.

        Args:
            seconds: of training, with its validations, at most.
            rest: seconds before and after it.
        """
        if self.rate:
            seconds = min(seconds, self.tokens / self.rate / (1 - VALIDATION_SHARE))
        parameters = layer_parameters(self.config) + self.config.dim * self.text.vocab_size
        expected = min(MOST_EXPECTED, self.expected)
        shared = f", by {self.processes} processes" if self.processes > 1 else ""
        copies = f", for each of {self.batches.copies} processes" if self.batches.copies > 1 else ""
        enough = "; to read it more often would not help" if self.steps == most_steps(self.batches, self.text) else ""
        return "\n".join(
            [
                f"model       about {parameters / 1e6:.2f} M parameters: "
                f"{self.config.layers} layers of {self.config.dim}",
                f"training    {self.steps:,} updates of {self.batches.rows} x {self.batches.seq_len} tokens{copies}: "
                f"{self.tokens / 1e6:.2f} M tokens, {self.epochs:.1f} epochs{shared}{enough}",
                f"time        {seconds / 60:.1f} minutes of training, and {rest:.0f} seconds before and after it",
                f"expected    {expected:.2f} bits/byte {likely_range(self.expected, self.spread, MOST_EXPECTED)}; "
                f"xz makes {self.text.xz:.2f}",
            ]
        )


def shapes_for(text: Text) -> tuple[ModelConfig, ...]:
    """Return the models that a plan for ``text`` chooses from: those of words count them."""
    if not has_words(text.vocab_size):
        return SHAPES
    return tuple(replace(config, count_half_lives=HALF_LIVES) for config in SHAPES)


def choose_batches(config: ModelConfig, train_tokens: int, tokens: int = 0) -> Batches:
    """Return the batches of a model: small ones for small models, and such that a short text has several of them.

    Args:
        config: of the model.
        train_tokens: of the training text.
        tokens: that are read in all, where that is planned.
    """
    is_small = layer_parameters(config) <= MOST_PARAMETERS_OF_SMALL_BATCHES
    rows = 16 if MANY_TOKENS <= tokens <= FEW_EPOCHS * train_tokens else 8
    wanted = Batches(rows, 128, 8) if is_small else Batches(4 if config.dim < 512 else 8, 512, 1)
    while wanted.tokens * 2 > train_tokens and wanted.seq_len > SHORTEST_ROW:
        wanted = replace(wanted, seq_len=wanted.seq_len // 2, interleave=1)
    while wanted.tokens * 2 > train_tokens and wanted.rows > 1:
        wanted = replace(wanted, rows=wanted.rows // 2, interleave=1)
    return wanted


@dataclass(frozen=True)
class Candidate:
    """What a plan may choose.

    Attributes:
        config: of the model.
        batches: of its updates.
    """

    config: ModelConfig
    batches: Batches

    @staticmethod
    def of(config: ModelConfig, text: Text, tokens: int = 0) -> Candidate:
        """Return a model with the batches that :func:`choose_batches` gives it."""
        return Candidate(config, choose_batches(config, text.train_tokens, tokens))


@dataclass(frozen=True)
class Rate:
    """How fast a model trains.

    Attributes:
        candidate: the model with its batches.
        tokens: a second.
        processes: that share out the rows of an update.
    """

    candidate: Candidate
    tokens: float
    processes: int = 1


def expected_loss(config: ModelConfig, text: Text, tokens: float, law: Law = LAW) -> float:
    """Return the bits per byte that a model is expected to reach when it has read so many tokens of a text."""
    expected = law.yardstick(text.ngram, text.xz, text.train_tokens)
    expected *= law.relative_loss(layer_parameters(config), text.train_tokens, tokens)
    return expected * (law.gain_of_counts(text.train_tokens) if config.count_half_lives else 1.0)


def most_steps(batches: Batches, text: Text) -> int:
    """Return the updates in which ``text`` is read :data:`MOST_EPOCHS` times."""
    return max(1, MOST_EPOCHS * text.train_tokens // batches.tokens)


def make_plan(
    text: Text,
    rates: Sequence[Rate],
    seconds: float,
    law: Law = LAW,
    most: Callable[[Batches, Text], int | None] = lambda batches, text: None,
) -> TrainingPlan:
    """Return the plan with the least expected loss.

    Args:
        text: what is read.
        rates: of the models.
        seconds: of training, with its validations.
        law: what is expected of the models.
        most: updates of such batches that were given as a limit beside the time; None for none.
    """
    plans = []
    for rate in rates:
        config, batches = rate.candidate.config, rate.candidate.batches
        steps = max(1, int(rate.tokens * seconds * (1 - VALIDATION_SHARE) / batches.tokens))
        steps = min(steps, most(batches, text) or most_steps(batches, text))
        expected = expected_loss(config, text, steps * batches.tokens, law)
        plans.append(TrainingPlan(config, batches, steps, text, expected, law.spread, rate.processes, rate.tokens))
    return min(plans, key=lambda plan: plan.expected)


def regularization(config: ModelConfig, tokens: float, text_tokens: int, vocab_size: int) -> dict[str, float]:
    """Return the options against overfitting of a training.

    By how often it reads its text, and by the root of the parameters for each token of that: a small model has little
    room to learn a text by heart.

    Args:
        config: of the model.
        tokens: that are read in all.
        text_tokens: of the training text.
        vocab_size: of the tokenizer.
    """
    room = tokens / text_tokens * math.sqrt(layer_parameters(config) / text_tokens)
    shares = DROPOUT_OF_WORDS if has_words(vocab_size) else DROPOUT
    dropout = max((share for share, begin in shares if room > begin), default=0.0)
    return {"dropout": dropout, "weight_decay": decay_beside(dropout), "confidence_penalty": 0.1}


def decay_beside(dropout: float) -> float:
    """Return the weight decay of a training with a share of dropout: the more of the one, the more of the other."""
    return 0.1 if not dropout else 0.3 if dropout < 0.1 else 0.5


def has_words(vocab_size: int) -> bool:
    """Whether so many tokens are words or parts of words."""
    return vocab_size > LARGEST_ALPHABET


def has_second_token(text: Text) -> bool:
    """Whether a model of ``text`` learns the token after the next one, too: where the vocabulary is small."""
    return text.vocab_size <= 1024


def learning_rate(config: ModelConfig) -> float:
    """Return the highest learning rate of a training: a wider model has a lower one."""
    return 3e-3 if config.dim < 256 else 2e-3 if config.dim < 512 else 1e-3


def fit_options(plan: TrainingPlan) -> list[str]:
    """Return the options of ``mmrec fit`` that carry a plan out, but for the text and for where it ends."""
    config, batches, steps = plan.config, plan.batches, plan.steps
    model = regularization(config, plan.tokens, plan.text.train_tokens, plan.text.vocab_size) | {
        "learning_rate": learning_rate(config),
        "warmup_steps": max(1, min(100, steps // 20)),
        "mtp_loss_weight": 0.3 if has_second_token(plan.text) else 0.0,
        "schedule": "wsd",
        "config": json.dumps(asdict(config)),
    }
    # A row goes elsewhere in the text after 16 rows' lengths, or sooner where the text has no room for that.
    segment = max(batches.seq_len, min(2048, plan.text.train_tokens // (4 * batches.copies * batches.rows)))
    data = {
        "batch_size": batches.rows,
        "seq_len": batches.seq_len,
        "segment_len": segment,
        "interleave": batches.interleave,
    }
    trainer = {"max_epochs": -1, "max_steps": most_steps(batches, plan.text), "check_val_every_n_epoch": "null"}
    trainer |= _validations(plan)
    options = {f"model.{name}": value for name, value in model.items()}
    options |= {f"data.{name}": value for name, value in data.items()}
    options |= {f"trainer.{name}": value for name, value in trainer.items()}
    options["early_stopping.patience"] = MOST_VALIDATIONS * 100
    return as_arguments(options)


def as_arguments(options: dict[str, object]) -> list[str]:
    """Return options of ``mmrec fit`` as they are typed."""
    return [f"--{name}={value}" for name, value in options.items()]


def _validations(plan: TrainingPlan) -> dict[str, object]:
    """Return how often the validation text is scored, and how much of it: at most a small share of the time."""
    # In tokens of updates that take as long; processes that share out rows share out what is scored, copies do not.
    copies = plan.batches.copies
    affordable, each = VALIDATION_SHARE * plan.tokens / copies, VALIDATION_SECONDS * plan.rate / copies
    whole = plan.text.val_tokens
    times = max(2, min(MOST_VALIDATIONS, int(affordable / (each + FORWARD_SHARE * whole))) // 2 * 2)  # one half-way
    every = -(-plan.steps // times)  # rounded up: the last one is that of the end
    options: dict[str, object] = {"val_check_interval": every}
    scored = max(affordable / times - each, affordable / times / 2) / FORWARD_SHARE
    if whole > scored:
        options["limit_val_batches"] = max(1, int(scored / (plan.batches.tokens // copies)))
    return options
