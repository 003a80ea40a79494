"""Read a text of any length once, keep the state that it leaves, and go on from there later.

    python examples/read_a_book.py BOOK.txt --checkpoint novel.ckpt

Run ``examples/train_on_your_text.py`` first: it makes the checkpoint, and the text that is read here where none is
named, the part of its text that was not trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmrec import MemoryLM

PAGE = 2000
"""Characters that are read at a time."""


def read_and_save(checkpoint: Path, text: str, saved: Path) -> None:
    """Read ``text`` page by page and save the state after it."""
    model = MemoryLM.load(str(checkpoint))
    pages = [text[first : first + PAGE] for first in range(0, len(text), PAGE)]
    for number, page in enumerate(pages, start=1):
        loss = model.read(page)  # in nats a token; the state is carried on from page to page
        print(f"page {number} of {len(pages)}: {loss:.3f} nats/token")
    model.save_memory(saved)
    print(f"{saved}: {saved.stat().st_size:,} bytes, however long the text was")


def go_on(checkpoint: Path, following: str, saved: Path) -> tuple[float, float]:
    """Return the loss on ``following`` with the saved state and without, in nats/token; and write on from it."""
    without = MemoryLM.load(str(checkpoint))
    model = MemoryLM.load(str(checkpoint))
    model.load_memory(saved)
    for piece in model.stream(length=200, temperature=0.7, seed=1):  # the state stays as it is
        print(piece, end="", flush=True)
    print()
    return model.read(following), without.read(following)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", nargs="?", type=Path, default=Path("data/example/val.txt"), help="%(default)s")
    parser.add_argument("--checkpoint", type=Path, default=Path("example.ckpt"), help="%(default)s")
    parser.add_argument("--saved", type=Path, default=Path("book.mem"), help="file of the state; %(default)s")
    given = parser.parse_args()
    text = given.book.read_text(encoding="utf-8")[: 21 * PAGE]
    middle = max(1, len(text) - PAGE // 4)
    read_and_save(given.checkpoint, text[:middle], given.saved)
    read, unread = go_on(given.checkpoint, text[middle:], given.saved)
    print(f"what follows: {read:.3f} nats/token after the book, {unread:.3f} without it")


if __name__ == "__main__":
    main()
