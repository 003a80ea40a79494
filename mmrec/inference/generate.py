"""Writing text: constant memory and constant time per token, however much has been read or written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mmrec.checkpoints.checkpoint import load_model
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState, load_memory, model_hash
from mmrec.core.errors import UserError
from mmrec.core.text_files import is_unicode
from mmrec.model import RecurrentLM, State
from mmrec.model.decode import Decoder
from mmrec.tokenizers import StreamDecoder

READ_CHUNK = 2048
"""Tokens of the prompt that are read at a time: bounds the memory that a long prompt takes."""

COLDEST = 1e-6
"""A temperature below it leaves no chance to any but the most likely token, and divides by what may round to 0."""


def sample_token(logits: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator) -> Tensor:
    """Draw the next token of each row.

    Args:
        logits: [B, N].
        temperature: below 1e-6 takes the most likely token; 1 draws from the model's own distribution.
        top_k: only the ``top_k`` most likely tokens may be drawn; 0 allows all.
        top_p: only the most likely tokens that together reach this probability may be drawn (nucleus
            sampling, Holtzman et al. 2020); at least one always may.
        random: source of the draw.

    Returns:
        [B], int64.
    """
    if temperature < COLDEST:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=random).squeeze(-1)


@torch.inference_mode()
def read(net: RecurrentLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """Read ``tokens`` [B, T], T at least 1; return the logits after the last one [B, N] and the state."""
    for part in tokens.split(READ_CHUNK, dim=1):
        logits, state = net(part, state)
    return logits[:, -1], state


def generate_tokens(
    net: RecurrentLM,
    prompt: Tensor,
    length: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    memory: SavedState | None = None,
) -> Iterator[int]:
    """Yield the tokens of :func:`generate_with_logits`, whose arguments these are."""
    for token, _ in generate_with_logits(net, prompt, length, temperature, top_k, top_p, seed, memory):
        yield token


@torch.inference_mode()
def generate_with_logits(
    net: RecurrentLM,
    prompt: Tensor,
    length: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    memory: SavedState | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``length`` tokens that continue ``prompt`` [T]; the same seed gives the same tokens.

    With each come the logits [N] that it was drawn from, in a buffer that the next token overwrites.

    Args:
        net: the model.
        prompt: tokens; may be none where there is a memory to go on from.
        length: number of tokens.
        temperature: as for :func:`sample_token`, like top_k and top_p.
        top_k: see there.
        top_p: see there.
        seed: of the draws.
        memory: what was read before the prompt; nothing if None.
    """
    random = torch.Generator(device=prompt.device).manual_seed(seed)
    before = memory or SavedState.empty(net)
    logits, state = before.logits[None], before.state
    if len(prompt):
        logits, state = read(net, prompt[None], state)
    decoder = Decoder(net, state) if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    for remaining in range(length, 0, -1):
        token = int(sample_token(logits, temperature, top_k, top_p, random))
        yield token, logits[0]
        if remaining > 1 and decoder is not None:
            logits = decoder.step(token)[None]
        elif remaining > 1:
            logits, state = read(net, torch.tensor([[token]], device=prompt.device), state)


def _standard_input() -> str:
    """Return all of standard input, without the line end that a shell puts after it."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"-: is not UTF-8 text at byte {error.start:,}") from None
    return text.removesuffix("\n").removesuffix("\r")


def check_sampling(length: int, temperature: float, top_k: int, top_p: float, dashes: str = "") -> None:
    """Raise UserError, with ``dashes`` before the option's name, where a text cannot be drawn so."""
    for name, value, good, rule in (
        ("length", length, length >= 0, "it must be at least 0"),
        ("temperature", temperature, temperature >= 0, "it must be at least 0"),
        ("top_k", top_k, top_k >= 0, "it must be at least 0"),
        ("top_p", top_p, 0 < top_p <= 1, "it must lie above 0 and be at most 1"),
    ):
        if not good:
            raise UserError(f"{dashes}{name} is {value!r}; {rule}")


def generate(
    checkpoint: CheckpointOptions,
    prompt: str | None = None,
    length: int = 500,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    memory: Path | None = None,
) -> None:
    """Continue a text with a trained model; the text appears as it is written.

    Args:
        checkpoint: of the model.
        prompt: the text to continue, or - for standard input; a line end if left out, or nothing where there is a
            memory.
        length: number of tokens to write.
        temperature: 0 always takes the most likely token; higher is more varied.
        top_k: draw among so many most likely tokens; 0 means all.
        top_p: draw among the most likely tokens that together reach this probability.
        seed: another seed gives another text.
        memory: go on from what was read before, a file of mmrec read.
    """
    if prompt is None:
        prompt = "\n" if memory is None else ""
    elif prompt == "-":
        prompt = _standard_input()
    if not prompt and memory is None:
        raise UserError("--prompt is ''; it must not be empty")
    if not is_unicode(prompt):
        raise UserError(f"--prompt is {prompt!r}; it must be UTF-8")
    check_sampling(length, temperature, top_k, top_p, "--")
    trained = load_model(checkpoint.path())
    tokens = torch.from_numpy(trained.tokenizer.encode(prompt).astype("int64"))
    before = None
    if memory is not None:
        before = load_memory(memory, trained.net, model_hash(trained.net, trained.tokenizer))
    decoder = StreamDecoder(trained.tokenizer)
    sys.stdout.write(prompt)
    for token in generate_tokens(trained.net, tokens, length, temperature, top_k, top_p, seed, before):
        sys.stdout.write(decoder.push(token))
        sys.stdout.flush()
    sys.stdout.write(decoder.flush() + "\n")
