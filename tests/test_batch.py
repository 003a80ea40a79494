"""Texts that are generated together: each as if it were alone, whoever joins and leaves."""

from __future__ import annotations

import pytest
import torch
from models import made

from mmrec.inference.batch import Batch, Row, padded
from mmrec.inference.decoders import CAPTURE_PAYS, make_decoder
from mmrec.model.decode import Decoder
from mmrec.tokenizers import CharacterTokenizer

NET = made(CharacterTokenizer("abcdefgh \n")).net


def test_texts_come_and_go_and_each_is_as_if_alone() -> None:
    size = len(NET.head.weight)
    texts = torch.randint(size, (9, 14))
    with torch.inference_mode():
        _, state = NET(texts[:, :4], NET.zero_state(9))
    states = [[(past[i, None], memory[i, None]) for past, memory in state] for i in range(9)]
    alone = []
    for text, own in zip(texts, states, strict=True):
        decoder = Decoder(NET, own)
        alone.append(torch.cat([decoder.step([token]).clone() for token in text[4:].tolist()]))
    batch, rows, done = Batch(NET), [Row(own) for own in states], [0] * 9
    # Who reads a token in each step; the order is another each time.
    for now in ([0], [2, 0, 1], [1, 2], [8, 7, 6, 5, 4, 3, 2, 1], [1, 8, 3, 7], [3, 7], [3]):
        found = batch.step([rows[i] for i in now], [int(texts[i, 4 + done[i]]) for i in now])
        for i, logits in zip(now, found, strict=True):
            assert torch.equal(logits, alone[i][done[i]])
            done[i] += 1
    with pytest.raises(AssertionError, match="the row has left"):
        batch.step([rows[0]], [1])


def test_sizes_of_batches() -> None:
    assert [padded(rows) for rows in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, 24]


def test_the_decoder_goes_by_the_device_and_the_numbers() -> None:
    assert isinstance(make_decoder(NET, NET.zero_state(1), CAPTURE_PAYS), Decoder)
    half = made(CharacterTokenizer("abc")).net.bfloat16()
    decoder = make_decoder(half, half.zero_state(2), CAPTURE_PAYS)
    assert not isinstance(decoder, Decoder)
    first = decoder.step([1, 2])
    decoder.set_state(half.zero_state(2))
    assert torch.equal(decoder.step([1, 2]), first)
    assert len(decoder.state()[0][0]) == 2
