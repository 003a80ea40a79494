"""Turkish, end to end: letters that others take for one another stay what they are, and whole."""

# ruff: noqa: RUF001 -- the dotless letter is what this is about

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, Command
from helpers import fit

from mmrec import MemoryLM
from mmrec.data.store import open_tokens
from mmrec.inference.text_input import iter_pieces
from mmrec.tokenizers import TOKENIZERS, StreamDecoder, Tokenizer, make_tokenizer

SENTENCES = """\
Sabah erkenden uyandım; ışık, perdenin arasından ince bir çizgi gibi sızıyordu.
İstanbul'a giden gemi Iğdır'dan gelen yolcuları bekliyordu.
ILIK bir rüzgâr esti, İNCE bir yağmur başladı.
Çocuklar ağacın gölgesinde oturmuş, dedelerinin anlattığı masalı dinliyorlardı.
"Şu tepenin ardında ne var?" diye sordu küçük kız; "Öğrenince bana da söyle!"
Büyükannem ığıl ığıl akan derenin kıyısında ıhlamur topladı, sonra güğümü doldurdu.
Kâğıdın üstüne üç sözcük yazdım: düş, gölge, ağaç.
Diyarbakır'ın sıcağında İsmail'in içtiği ayran ılımıştı.
Yığınla iş vardı, ama hiçbiri ötekinden daha önemsiz görünmüyordu.
Gece inince şehir sustu; yalnız vapurun düdüğü uzun uzun öttü.
"""
"""Written for this test."""

DOTTED, DOTLESS = "iİ", "ıI"
OTHERS = "ğüşöçâîûĞÜŞÖÇÂÎÛ"
COMBINED = "i\u0307" + "I\u0307"
"""The two letters with a combining dot above: what lower and upper casing of others leaves behind."""
TURKISH = SENTENCES + unicodedata.normalize("NFD", SENTENCES) + f"{COMBINED}{DOTTED}{DOTLESS} {OTHERS}\n"
TEXT = TURKISH * 8
PROMPT = "İyi ki ılık ışık; ığğ"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(request.param, TEXT, TURKISH, 400 if request.param == "bpe" else None)


def test_every_letter_comes_back(tokenizer: Tokenizer) -> None:
    for text in (TURKISH, COMBINED, DOTTED + DOTLESS, OTHERS, PROMPT):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_letter_is_taken_for_another(tokenizer: Tokenizer) -> None:
    """Neither case nor the dot is folded, and what is composed differs from what is not."""
    letters = ["i", "İ", "ı", "I", "i\u0307", "I\u0307", "g", "ğ", "g\u0306", "s", "ş", "s\u0327"]
    assert len({tuple(tokenizer.encode(letter).tolist()) for letter in letters}) == len(letters)


def test_a_streamed_text_comes_in_whole_characters(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push(int(token)) for token in tokenizer.encode(TURKISH)]
    assert "".join(shown) == TURKISH
    assert decoder.flush() == ""
    assert not any("\ufffd" in piece for piece in shown)


def test_an_end_inside_a_letter_is_shown_as_one_replacement() -> None:
    tokenizer = make_tokenizer("bytes", "a", "a")
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(byte) for byte in "ığ".encode()[:3]] == ["", "ı", ""]
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize("size", [2, 3, 100])
def test_pieces_of_a_file_are_whole(tokenizer: Tokenizer, size: int) -> None:
    parts = [tokenizer.encode(piece) for piece in iter_pieces(io.StringIO(TURKISH, newline=""), size)]
    assert np.concatenate(parts).tolist() == tokenizer.encode(TURKISH).tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_from_the_text_to_what_is_written(
    name: str, mmrec: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("öykü.txt").write_text(TEXT, encoding="utf-8", newline="")
    prepare = ["prepare", "--input_file", "öykü.txt", "--output_dir", "öykü", "--tokenizer", name]
    assert mmrec(*prepare, *(["--vocab_size", 400] if name == "bpe" else [])) == 0
    tokens = open_tokens(Path("öykü"))
    texts = [Path("öykü", f"{part}.txt").read_bytes().decode("utf-8", errors="strict") for part in ("train", "val")]
    assert "".join(texts) == TEXT  # and cut between characters: each part decodes by itself
    assert [tokens.tokenizer.decode(part) for part in (tokens.train, tokens.val)] == texts

    assert mmrec(*fit(Path("öykü"), "--trainer.max_epochs=1", "--run=öykü")) == 0
    for text in (PROMPT, COMBINED, "ı", "İ"):
        capsys.readouterr()
        assert mmrec("generate", "--prompt", text, "--length", 40, "--seed", 2) == 0
        written = capsys.readouterr().out
        assert written.startswith(text)
        assert written.encode("utf-8").decode("utf-8") == written
        if name == "characters":
            assert len(written) == len(text) + 40 + 1
            assert set(written) <= set(TEXT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert mmrec("generate", "--prompt", "-", "--length", 5) == 0
    assert capsys.readouterr().out.startswith(PROMPT)
    assert mmrec("read", "öykü.txt", "--save", "öykü.mem") == 0
    assert mmrec("score", "öykü.txt", "--memory", "öykü.mem", "--token_nll", "öykü.tsv") == 0
    model = MemoryLM.load("best")
    assert "".join(model.stream(PROMPT, length=40)) == model.generate(PROMPT, length=40)


def test_the_command_takes_turkish_arguments_whatever_the_locale(mmrec: Command, prepared: Path) -> None:
    """A locale of C, as in a container or a service, must not keep letters from coming in and out."""
    Path("ı.txt").write_text(TEXT, encoding="utf-8")
    assert mmrec("prepare", "--input_file", "ı.txt", "--output_dir", "ı", "--tokenizer", "bytes") == 0
    assert mmrec(*fit(Path("ı"), "--trainer.max_steps=2", "--run=ı")) == 0
    command = [sys.executable, "-m", "mmrec", "generate", "--ckpt", "last", "--length", "0", "--prompt", PROMPT]
    environment = {"LC_ALL": "C", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8") == PROMPT + "\n"
