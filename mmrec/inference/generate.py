"""``mmrec generate``: constant memory and constant time per token, however much has been read or generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.core.text_files import is_unicode
from mmrec.core.threads import use_threads
from mmrec.inference.reading import Reader, load_model_and_state
from mmrec.inference.sampling import Sampler, SamplingOptions
from mmrec.inference.text_input import read_standard_input
from mmrec.model import RecurrentLM
from mmrec.tokenizers import StreamDecoder, Tokenizer


def generate_tokens(
    net: RecurrentLM, prompt: Tensor, options: SamplingOptions, memory: SavedState | None = None
) -> Iterator[int]:
    """Yield the tokens of :func:`generate_with_logits`, whose arguments these are."""
    for token, _ in generate_with_logits(net, prompt, options, memory):
        yield token


@torch.inference_mode()
def generate_with_logits(
    net: RecurrentLM, prompt: Tensor, options: SamplingOptions, memory: SavedState | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``options.length`` tokens that continue ``prompt`` [T]; the same seed gives the same tokens.

    With each come the logits [N] that it was drawn from, on the CPU, in a buffer that the next token may overwrite.
    Whatever computes the logits, the CPU draws: a seed gives the same numbers on every device.

    Args:
        net: the model.
        prompt: tokens; may be none where there is a memory to go on from.
        options: how many, and how each is drawn.
        memory: what was read before the prompt; nothing if None.
    """
    sampler = Sampler(options)
    reader = Reader(net, memory or SavedState.empty(net))
    for _ in reader.read(prompt):
        pass
    logits, decoder = reader.generating(options.length, options.verbatim)
    for remaining in range(options.length, 0, -1):
        logits = logits.cpu()
        token = sampler.draw(logits)
        yield token, logits
        if remaining > 1:
            logits = decoder.step([token])[0]


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return what a text without a prompt begins with: a line end, a space, or the first symbol that there is."""
    for text in ("\n", " "):
        with contextlib.suppress(UserError):  # a character that the tokenizer lacks
            tokenizer.encode(text)
            return text
    return tokenizer.decode([0])


def generate(
    checkpoint: CheckpointOptions, sampling: SamplingOptions, prompt: str | None = None, memory: Path | None = None
) -> None:
    """Continue a text with a trained model; the text appears as it is generated.

    Args:
        checkpoint: of the model.
        sampling: how many tokens, and how each is drawn.
        prompt: the text to continue, or - for standard input; if left out, a line end (where the model knows none, a
            space or its first symbol), or nothing where there is a memory.
        memory: go on from what was read before, a file of mmrec read.
    """
    if prompt == "-":
        prompt = read_standard_input()
    if prompt == "" and memory is None:
        raise UserError("--prompt is ''; it must not be empty")
    if prompt is not None and not is_unicode(prompt):
        raise UserError(f"--prompt is {prompt!r}; it must be UTF-8")
    trained, _, before = load_model_and_state(checkpoint, memory)
    use_threads(trained.net.config.dim)
    if sampling.verbatim and before.cached is None:
        raise UserError("--verbatim is for a memory with a cache of n-grams; make one by mmrec read --cache")
    if prompt is None:
        prompt = default_prompt(trained.tokenizer) if memory is None else ""
    tokens = torch.from_numpy(trained.tokenizer.encode(prompt).astype("int64"))
    decoder = StreamDecoder(trained.tokenizer, b"" if prompt else before.pending)
    sys.stdout.write(prompt)
    for token in generate_tokens(trained.net, tokens, sampling, before):
        sys.stdout.write(decoder.push(token))
        sys.stdout.flush()
    sys.stdout.write(decoder.flush() + "\n")
