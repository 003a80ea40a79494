"""The Python API: ``from mmrec import MemoryLM``."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch

from mmrec.checkpoints.learned import Form
from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import SavedState, load_memory, model_hash, save_memory
from mmrec.core.devices import AUTO
from mmrec.core.errors import UserError
from mmrec.core.text_files import is_unicode
from mmrec.inference.generate import generate_tokens
from mmrec.inference.reading import CacheOptions, LearnOptions, Reader
from mmrec.inference.sampling import SamplingOptions
from mmrec.inference.text_input import iter_pieces
from mmrec.tokenizers import StreamDecoder


class MemoryLM:
    """A trained model with what it has read.

        model = MemoryLM.load("best")
        model.read(Path("book.txt").read_text())
        print(model.generate("And then", length=200))
        model.save_memory("book.mem")

    Attributes:
        memory: what was read; assign one to go on from it.
    """

    def __init__(self, trained: LoadedModel) -> None:
        self._trained = trained
        self._hash = model_hash(trained.net, trained.tokenizer)
        self.memory = SavedState.empty(trained.net)

    @classmethod
    def load(
        cls, checkpoint: str = "best", run: str | None = None, root: Path | str = ".", device: str = AUTO
    ) -> MemoryLM:
        """Load a checkpoint onto a device.

        Args:
            checkpoint: best, last, the path of one or of a run's folder, or hf:OWNER/NAME.
            run: name of the run that best and last mean; the latest if None.
            root: folder that holds lightning_logs.
            device: auto, cpu, cuda, mps or cuda:NUMBER; auto takes a GPU where one works.

        Raises:
            UserError: there is no such checkpoint, or no such device here.
        """
        return cls(load_chosen(CheckpointOptions(str(checkpoint), run, Path(root), device)))

    def read(self, text: str, learn: bool = False, form: Form | None = None, cache: int | None = None) -> float:
        """Read ``text`` on from the memory, which then includes it; return its mean loss, in nats/token.

        Where it cannot be read to its end, the memory stays as it is.

        Args:
            text: of any length.
            learn: change the weights by what is read, each part after it was predicted; the memory keeps the
                difference, and a memory that learned goes on learning without being told.
            form: which weights learn: "full", all of them, or "small"; "full" if None.
            cache: count the n-grams of what is read, in a table of so many MiB, and mix what they predict with what
                the model does; a memory that has such a cache counts on without being told.

        Raises:
            UserError: a character is not in the model's alphabet or is half a surrogate pair, there is no such form,
                the memory learns in another one, or has a cache of another size, or the model cannot have one.
        """
        _check_text(text)
        learning = LearnOptions(learn, form).applied(self._trained.net, self.memory)
        memory = CacheOptions(cache).applied(self._trained.net, learning, self._trained.tokenizer)
        reader = Reader(self._trained.net, memory)
        total, count, first = 0.0, 0, memory.position == 0
        for piece in iter_pieces(io.StringIO(text, newline="")):
            tokens = self._trained.tokenizer.encode(piece)
            for part in reader.read(tokens):
                memory = part.memory
                total, count = total + float(part.nll.sum(dtype=torch.float64)), count + len(part.tokens)
        self.memory = memory
        scored = count - first
        return total / scored if scored > 0 else 0.0

    def stream(
        self,
        prompt: str = "",
        length: int = 500,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        verbatim: int = 0,
    ) -> Iterator[str]:
        """Yield a text that continues the memory and ``prompt``, as it is generated. The memory stays as it is.

        Raises:
            UserError: an option is out of its range, or a character of ``prompt`` is not in the model's alphabet, or
                half a surrogate pair.
        """
        options = SamplingOptions(length, temperature, top_k, top_p, seed, verbatim)
        _check_text(prompt)
        tokens = torch.from_numpy(self._trained.tokenizer.encode(prompt).astype("int64"))
        decoder = StreamDecoder(self._trained.tokenizer, b"" if prompt else self.memory.pending)
        for token in generate_tokens(self._trained.net, tokens, options, self.memory):
            yield decoder.push(token)
        yield decoder.flush()

    def generate(self, prompt: str = "", length: int = 500, **options: float) -> str:
        """Return the text of :meth:`stream` as a whole."""
        return "".join(self.stream(prompt, length, **options))  # type: ignore[arg-type]

    def save_memory(self, path: Path | str) -> None:
        """Write the memory to a small file."""
        save_memory(Path(path), self.memory, self._hash)

    def load_memory(self, path: Path | str) -> None:
        """Go on from a memory that this model has saved; UserError where it is another's, or damaged."""
        self.memory = load_memory(Path(path), self._trained.net, self._hash)


def _check_text(text: str) -> None:
    """Raise TypeError where ``text`` is none, or UserError where it holds what no encoding has."""
    if not isinstance(text, str):
        raise TypeError(f"the text is of type {type(text).__name__}; give a str, as Path(...).read_text() returns")
    if not is_unicode(text):
        raise UserError("the text holds half a surrogate pair; decode it with errors='replace', or leave that out")
