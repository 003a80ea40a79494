"""The split of a large corpus, for any documents: no text is lost, cut without need, or on both sides."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from fuzzing import ANY_TEXT
from hypothesis import strategies as st
from layouts import split_at_separator

from mmrec.core.errors import UserError
from mmrec.data.pipeline.merge import merge
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.split import Shards
from mmrec.data.pipeline.tokenize_shard import stem, tokenize, write_json
from mmrec.data.provenance import Provenance
from mmrec.tokenizers import ByteTokenizer

LONG = st.integers(1, 400).map(lambda count: "a longer one \u4e16 " * count)
DOCUMENTS = st.lists((ANY_TEXT | LONG).filter(str.strip), min_size=1, max_size=6)


def large_split(data: st.DataObject) -> None:
    """Split by shards, every text is whole on one side, or the one that is cut has its halves on either."""
    distinct = data.draw(DOCUMENTS)
    texts = data.draw(st.lists(st.sampled_from(distinct), min_size=1, max_size=12))
    share, drop = data.draw(st.floats(0.01, 0.9)), data.draw(st.booleans())
    work, tokenizer = Path("split.work"), ByteTokenizer(documents=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    count = data.draw(st.integers(1, 3))
    paths = [str(work / f"{number}.jsonl") for number in range(count)]
    for number, path in enumerate(paths):
        lines = (json.dumps({"text": text}) for text in texts[number::count])
        Path(path).write_text("\n".join(lines), encoding="utf-8")
        counts = tokenize(Shard("jsonl", path), "text", tokenizer, work / stem(number))
        write_json(work / f"{stem(number)}.json", counts)
    description = {"corpus": {"name": "paths", "title": "fuzz"}, "split": {"val_split": share}}
    shards = Shards(work, [None] * count, share, paths, Provenance())
    texts = [text.removeprefix("\ufeff") for text in texts]
    try:
        tokens = merge(shards, Path("split"), tokenizer, description, drop, 1)
    except UserError as error:
        assert "too little text" in str(error)  # noqa: PT017 - any other error is a failure
        assert len(set(texts)) == 1 or min(map(len, texts)) < 4
        return
    train, val = split_at_separator(tokens, "train"), split_at_separator(tokens, "val")
    assert train
    assert val
    rule = tokens.manifest["split"]["rule"]
    kept = Counter(set(texts)) if drop else Counter(texts)
    if "last part" in rule:
        halves = [(one, other) for one in train for other in val if one + other in kept]
        assert halves
        head, tail = max(halves, key=lambda pair: len("".join(pair)))
        train.remove(head)
        val.remove(tail)
        kept.pop(head + tail)  # of its copies one is kept
        assert head + tail not in train + val
    assert not set(train) & set(val)
    assert Counter(train) + Counter(val) == kept
