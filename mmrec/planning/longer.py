"""What a training that is made longer is expected to reach: what came of it so far tells most of it."""

from __future__ import annotations

import math
from pathlib import Path

from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.law import LAW, Law
from mmrec.planning.record import seconds_trained

SPREAD = 0.023
"""What the logarithm of the outcome is not off by in two of three pairs of trainings of docs/planning-study.md."""
FEWEST_TOKENS = 200_000
"""That were read before; of shorter trainings the law knows too little."""


def expected_of_longer(
    came: float, best: Path, seconds: float, most_steps: int | None, copies: int, text_tokens: int, law: Law = LAW
) -> float | None:
    """Return the bits per byte that a longer training is expected to reach; None where too little was read before.

    The law says what more tokens take from what came so far: what it is off by on a text is nearly the same however
    many tokens of it are read. No more are expected than came: the best model is kept.

    Args:
        came: bits per byte of the best checkpoint.
        best: that checkpoint.
        seconds: of training in all, at the pace before.
        most_steps: updates in all that are a limit beside the time; None for none.
        copies: processes that have rows of their own.
        text_tokens: of the training text.
        law: how the loss falls by the tokens.
    """
    checkpoint = read_checkpoint(find_intact_checkpoint(best, says=False), mmap=True, verify=False)
    data, steps = checkpoint["TextDataModule"], int(checkpoint["global_step"])
    before = seconds_trained(best)
    tokens = copies * data["batch_size"] * data["seq_len"] * steps
    if tokens < FEWEST_TOKENS or before == 0:
        return None
    times = min(seconds / before, math.inf if most_steps is None else most_steps / steps)
    parameters = layer_parameters(ModelConfig.from_dict(checkpoint[MODEL_KEY]["shape"]))
    loss, longer = (law.relative_loss(parameters, text_tokens, each) for each in (tokens, times * tokens))
    return came * min(1.0, longer / loss)


def describe(came: float, expected: float | None) -> str:
    """Return what is said of a longer training, after ``came`` bits per byte so far."""
    if expected is None:
        return ""
    if expected == came:
        return f"; no better model than that of {came:.2f} bits/byte is expected"
    low, high = (expected * math.exp(part * SPREAD) for part in (-1, 1))
    return f"; {expected:.2f} bits/byte are expected ({low:.2f} to {high:.2f} two times of three), {came:.2f} before"
