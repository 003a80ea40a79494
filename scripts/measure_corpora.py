#!/usr/bin/env python3
"""Measure the preparation of large corpora: readers against the libraries they use, workers, and memory.

    python scripts/measure_corpora.py FOLDER [--megabytes 30] [--small 100] [--large 2000] [--dump enwiki.xml.bz2]

Real text (Python's help topics, and --text files) is repeated in the exact layouts of OpenWebText and C4. Speeds are
in MB of text a second. Every pair is measured in turn, three times; the ratio is what tells, as machines are shared.
Where FOLDER is in memory (as /dev/shm), no disk bounds the workers.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import orjson
import pyarrow
import pyarrow.parquet
from layouts import record_of, tar_of

from mmrec.data.pipeline.readers import READERS
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.wikitext import clean
from mmrec.tokenizers import BPETokenizer, ByteTokenizer


def documents(files: list[Path], size: int) -> Iterator[str]:
    """Yield about ``size`` bytes of documents of real text, each made its own by a number."""
    from pydoc_data.topics import topics

    texts = [str(topics[name]) for name in sorted(topics)]
    for file in files:
        paragraphs = file.read_text(encoding="utf-8").split("\n\n")
        texts += ["\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20)]
    done = number = 0
    while done < size:
        for text in texts:
            number += 1
            document = f"Document {number}\n{text}"
            yield document
            done += len(document.encode())
            if done >= size:
                return


def speed(read: Callable[[], Iterable[object]]) -> tuple[float, int]:
    """Return (seconds, bytes of text) of one pass."""
    began = time.monotonic()
    size = sum(len(text.encode()) for text in read() if isinstance(text, str))
    return time.monotonic() - began, size


def compare(name: str, ours: Callable[[], Iterable[object]], theirs: Callable[[], Iterable[object]]) -> None:
    """Print both speeds and their ratio, each the median of three turns."""
    pairs = [(speed(ours), speed(theirs)) for _ in range(3)]
    assert pairs[0][0][1] == pairs[0][1][1], f"{name}: {pairs[0][0][1]} and {pairs[0][1][1]} bytes"
    mine, other = (statistics.median(pair[i][1] / pair[i][0] / 1e6 for pair in pairs) for i in (0, 1))
    ratio = statistics.median(pair[1][0] / pair[0][0] for pair in pairs)
    print(f"{name:<34}{mine:>10.1f}{other:>10.1f}{ratio:>8.2f}", flush=True)


def readers(folder: Path, texts: list[str], dump: Path | None) -> None:
    """Write each layout, and read it by ours and by the library alone."""
    data = b"".join(orjson.dumps({"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) + b"\n" for t in texts)
    c4 = folder / "c4-train.00000-of-01024.json.gz"
    c4.write_bytes(gzip.compress(data, 6))

    def read_c4() -> Iterator[str]:
        with gzip.open(c4) as file:
            for line in file:
                yield orjson.loads(line)["text"]

    compare("C4, json.gz (gzip, orjson)", lambda: READERS["jsonl"](Shard("jsonl", str(c4)), "text"), read_c4)

    records = folder / "c4-train.tfrecord-00000-of-01024"
    records.write_bytes(b"".join(record_of(text) for text in texts))
    from tfrecord.reader import tfrecord_loader

    def read_records() -> Iterator[str]:
        for row in tfrecord_loader(str(records), None, {"text": "byte"}):
            yield bytes(row["text"]).decode()

    compare(
        "C4, tfrecord (tfrecord)", lambda: READERS["tfrecord"](Shard("tfrecord", str(records)), "text"), read_records
    )

    parquet = folder / "train-00000-of-00080.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)

    def read_parquet() -> Iterator[str]:
        for batch in pyarrow.parquet.ParquetFile(parquet).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()

    compare("parquet (pyarrow)", lambda: READERS["parquet"](Shard("parquet", str(parquet)), "text"), read_parquet)

    tar = folder / "urlsf_subset00-1_data.xz"
    tar.write_bytes(tar_of({f"{i:07d}-a.txt": text.encode() for i, text in enumerate(texts)}))

    def read_tar() -> Iterator[str]:
        with lzma.open(tar) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                yield content.read().decode()

    compare("OpenWebText, tar.xz (lzma, tarfile)", lambda: READERS["tar"](Shard("tar", str(tar)), "text"), read_tar)

    if dump is not None:
        import mwxml

        def read_dump() -> Iterator[str]:
            with bz2.open(dump) as file:
                for page in mwxml.Dump.from_file(file):
                    revisions = list(page)
                    if page.namespace == 0 and page.redirect is None:
                        yield clean(revisions[-1].text or "")

        ours = Shard("mediawiki", str(dump))
        compare("Wikipedia, bz2 (mwxml, mwparser...)", lambda: READERS["mediawiki"](ours, "text"), read_dump)


def tokenizers(texts: list[str]) -> None:
    """Compare our encoding with the library's own."""
    from tokenizers import Tokenizer

    bpe = BPETokenizer.train(texts[:300], 8192, documents=True)
    library = Tokenizer.from_str(bpe.state()["model"])

    def ours() -> Iterator[str]:
        for text in texts:
            bpe.encode(text)
            yield text

    def theirs() -> Iterator[str]:
        for text in texts:
            library.encode(text)
            yield text

    compare("BPE, 8192 tokens (tokenizers)", ours, theirs)
    byte = ByteTokenizer(documents=True)
    seconds, size = speed(lambda: (byte.encode(text) is not None and text for text in texts))
    print(f"{'bytes (no library)':<34}{size / seconds / 1e6:>10.1f}")


def prepare(source: Path, target: Path, workers: int, *options: str) -> tuple[float, int]:
    """Run ``mmrec prepare``; return its seconds and the largest resident size of any of its processes, in bytes."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    command = [sys.executable, "-m", "mmrec", "prepare", str(source), "--output_dir", str(target), "--force"]
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", code, *command, "--workers", str(workers), *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.monotonic() - began, int(ran.stdout) * 1024


def write_shards(folder: Path, texts: Iterable[str], shards: int) -> int:
    """Write json lines, round robin; return the bytes of text."""
    folder.mkdir(parents=True, exist_ok=True)
    size = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{k:03d}.jsonl", "wb")) for k in range(shards)]
        for number, text in enumerate(texts):
            files[number % shards].write(orjson.dumps({"text": text}) + b"\n")
            size += len(text.encode())
    return size


def disk(folder: Path, size: int = 10**9) -> float:
    """Return the MB a second at which a large file gets onto the disk of ``folder``."""
    block, began = bytes(10**7), time.monotonic()
    with open(folder / "disk", "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "disk").unlink()
    return size / (time.monotonic() - began) / 1e6


def workers(source: Path, size: int) -> None:
    """Print what ``mmrec prepare`` does with one worker and with two, by both tokenizers."""
    for name, *options in (["bytes"], ["bpe", "--vocab_size", "4096"]):
        ran = {n: prepare(source, source.with_name("out"), n, "--tokenizer", name, *options) for n in (1, 2)}
        (one, _), (two, _) = ran.values()
        rates = ", ".join(f"{size / seconds / 1e6:.1f} MB/s with {n}" for n, (seconds, _) in ran.items())
        largest = " and ".join(f"{memory / 2**20:.0f}" for _, memory in ran.values())
        print(
            f"prepare, {size / 1e6:,.0f} MB, {name}: {rates}, gain {one / two:.2f}; largest process {largest} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=30, help="of text for the readers; 0 leaves them out")
    parser.add_argument("--small", type=int, default=100, help="megabytes of the small input; 0 leaves it out")
    parser.add_argument("--large", type=int, default=2000, help="megabytes of the large input; 0 leaves it out")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.megabytes:
        texts = list(documents(asked.text, asked.megabytes * 10**6))
        print(f"{'':<34}{'MB/s':>10}{'library':>10}{'ratio':>8}")
        readers(asked.folder, texts, asked.dump)
        tokenizers(texts[: len(texts) // 4])
    print(f"the disk writes {disk(asked.folder):,.0f} MB/s")
    for name, megabytes in (("small", asked.small), ("large", asked.large)):
        if megabytes:
            size = write_shards(asked.folder / name, documents(asked.text, megabytes * 10**6), 16)
            workers(asked.folder / name, size)
            shutil.rmtree(asked.folder / name)


if __name__ == "__main__":
    main()
