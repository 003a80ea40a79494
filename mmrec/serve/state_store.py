"""Named memories: files of :mod:`mmrec.checkpoints.state_file` in one folder, bounded in number and size."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import (
    SavedState,
    largest_memory,
    load_memory,
    memory_bytes,
    memory_header,
    model_hash,
    save_memory,
)
from mmrec.core.errors import UserError
from mmrec.serve.limits import Limits
from mmrec.serve.protocol import ApiError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
END = ".mem"
LARGEST = 1e6
"""Of the numbers in an uploaded memory; those that come of reading are some thousand times smaller."""


class StateStore:
    """The memories of one model. Every method may be called from any thread.

    Args:
        folder: of the files; made where it is not there. Nothing else in it is touched.
        trained: the model.
        limits: of their number and size.
    """

    def __init__(self, folder: Path, trained: LoadedModel, limits: Limits) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
        self._folder, self._net, self._limits = folder, trained.net, limits
        self._model = model_hash(trained.net, trained.tokenizer)
        self._writing = threading.Lock()
        self.most_bytes = largest_memory(trained.net) + (limits.cache << 20)

    def load(self, name: str | None) -> SavedState:
        """Return the memory ``name``, or an empty one for None; :class:`ApiError` where there is none."""
        if name is None:
            return SavedState.empty(self._net)
        path = self.path(name)
        with _named(path, name):
            return load_memory(path, self._net, self._model)

    def save(self, name: str, memory: SavedState) -> dict[str, Any]:
        """Keep ``memory`` as ``name``, in place of what had that name; return what :meth:`about` does."""
        path = self.path(name, there=False)
        with self._writing, _named(path, name):
            others = [other for other in self._files() if other != path]
            if len(others) >= self._limits.memories:
                raise ApiError(409, f"{len(others)} memories are kept already; delete one first", "name")
            if sum(_size(other) for other in others) + memory_bytes(memory) > self._limits.memory_bytes:
                raise ApiError(409, "the memories take as much room as they may; delete one first", "name")
            save_memory(path, memory, self._model)
        return self.about(name)

    def put(self, name: str, data: bytes) -> dict[str, Any]:
        """Keep the memory file ``data`` as ``name``; :class:`ApiError` where it is not one of this model."""
        path = self.path(name, there=False)
        with _named(path, "the file"):
            memory = load_memory(path, self._net, self._model, data)
        if memory.cached is not None:
            self.check_cache(memory.cached.megabytes)
        # Anyone can write such a file, with numbers that would overflow later, in the middle of a text.
        states = [memory.state]
        numbers = [memory.logits]
        if memory.learned is not None:
            states += [memory.learned.state, memory.learned.untouched]
            numbers += [memory.learned.logits, memory.learned.mix]
        numbers += [tensor for state in states for layer in state for tensor in layer]
        if any((tensor.abs() > LARGEST).any() for tensor in numbers):
            raise ApiError(400, "the file holds numbers larger than reading ever makes them", "memory")
        return self.save(path.stem, memory)

    def check_cache(self, megabytes: int) -> None:
        """Raise :class:`ApiError` where a cache of so many MiB is larger than one may be."""
        if megabytes > self._limits.cache:
            raise ApiError(400, f"a cache of {megabytes:,} MiB; at most {self._limits.cache:,} are allowed", "cache")

    def data(self, name: str) -> bytes:
        """Return the file of the memory ``name``."""
        path = self.path(name)
        with _named(path, name):
            return path.read_bytes()

    def delete(self, name: str) -> None:
        """Delete the memory ``name``."""
        path = self.path(name)
        with _named(path, name):
            path.unlink()

    def about(self, name: str) -> dict[str, Any]:
        """Return a memory's name, tokens read, form of learning, bytes, and whether this model can use it."""
        path = self.path(name)
        with _named(path, name):
            header = memory_header(path)
            status = path.stat()
        return {
            "id": name,
            "object": "memory",
            "created": int(status.st_mtime),
            "position": header.position,
            "learned": header.learned,
            "bytes": status.st_size,
            "usable": header.model == self._model and header.is_current,
        }

    def all(self) -> list[dict[str, Any]]:
        """Return what :meth:`about` says of each memory, by name; what is no memory is left out."""
        found = []
        for path in self._files():
            with contextlib.suppress(ApiError):  # deleted meanwhile, or only named like one
                found.append(self.about(path.stem))
        return found

    def path(self, name: str, there: bool = True) -> Path:
        """Return the file of the memory ``name``; :class:`ApiError` for a bad name, or where it must be ``there``."""
        if not NAME.fullmatch(name):
            rule = "1 to 64 letters, digits, - and _ of ASCII, the first a letter or digit"
            raise ApiError(400, f"{name[:80]!a} is no name of a memory: {rule}", "memory")
        path = self._folder / f"{name}{END}"
        if there and not path.is_file():
            raise ApiError(404, f"there is no memory {name!r}", "memory", "memory_not_found")
        return path

    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"*{END}") if NAME.fullmatch(path.stem) and path.is_file())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # deleted meanwhile
        return 0


@contextmanager
def _named(path: Path, name: str) -> Iterator[None]:
    """Make the errors about a file such that say its name to the user, not where it lies on the server."""
    try:
        yield
    except FileNotFoundError:
        raise ApiError(404, f"there is no memory {name!r}", "memory", "memory_not_found") from None
    except UserError as error:
        raise ApiError(400, str(error).replace(str(path), name), "memory") from None
    except OSError as error:
        raise ApiError(507, f"{name}: {error.strerror}", "memory") from None
