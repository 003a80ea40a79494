"""Limits of one request, and of all of them together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mmrec.core.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds of the server; what goes beyond one of them is refused with an error that names it.

    Args:
        running: requests whose texts the model reads at a time.
        batch: texts that are generated together, a token of each at a time.
        waiting: requests beyond those, which are generated or wait; further ones are told to come back later.
        connections: open at a time.
        body_bytes: of a request; a text to read into a memory is one, and more can be read on from there.
        prompt_tokens: read for one completion or score, all its prompts together; given back, in all its choices.
        max_tokens: written for one completion, all its choices together.
        choices: of one completion: its prompts times n.
        memories: memory files in the folder.
        memory_bytes: of all memory files together.
        cache: of a memory's table of n-grams, in MiB.
    """

    running: int = 2
    batch: int = 16
    waiting: int = 16
    connections: int = 128
    body_bytes: int = 1 << 20
    prompt_tokens: int = 1 << 17
    max_tokens: int = 1 << 14
    choices: int = 128
    memories: int = 100
    memory_bytes: int = 1 << 30
    cache: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "waiting" else 1
            if getattr(self, field.name) < least:
                raise UserError(f"--limits.{field.name} is {getattr(self, field.name)}; it must be at least {least}")


DEFAULT = Limits()
