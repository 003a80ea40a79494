"""Corpora that outgrow memory, the whole way: restarts, the split, and equal results whoever does the work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from layouts import split_at_separator, texts, tokens_of, write_json_lines, write_parquet

from mmrec.data.corpora.large import LARGE_CORPORA
from mmrec.data.pipeline import tokenize_shard as work
from mmrec.data.pipeline.merge import merge
from mmrec.data.pipeline.records import Rejected
from mmrec.data.pipeline.shards import Shard
from mmrec.data.pipeline.split import Shards
from mmrec.data.pipeline.tokenize_shard import documents, hash_of
from mmrec.data.store import TokenFolder, open_tokens
from mmrec.tokenizers import Tokenizer, load_tokenizer

pytest.importorskip("datatrove")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def make_folder(folder: Path, count: int = 120) -> Path:
    """A folder with every format of one's own: some texts twice, some records bad."""
    pieces = texts(count)
    write_json_lines(folder / "a.jsonl", pieces[:40])
    write_json_lines(folder / "b" / "b.json.gz", [*pieces[40:60], pieces[0], pieces[1], "  "])
    write_parquet(folder / "c.parquet", [*pieces[60:100], None])
    for i, text in enumerate(pieces[100:]):
        (folder / f"{i}.md").write_text(text, encoding="utf-8")
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b"{broken\n")
    return folder


def test_a_folder_of_everything(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "mine")
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "2", "--drop_duplicates") == 0
    tokens = open_tokens(Path("out"))
    train, val = split_at_separator(tokens, "train"), split_at_separator(tokens, "val")
    assert sorted(train + val) == sorted(texts())
    # Whether a document validates is decided by its text alone.
    share = int(0.05 * 2**64)
    assert set(val) == {text for text in texts() if int(hash_of(text.encode())[0]) < share}
    manifest = tokens.manifest
    assert manifest["rejected"] == {"empty": 1, "no text in text": 1, "not JSON": 1}
    assert manifest["documents"]["duplicates"]["documents"] == 2
    assert sum(part["documents"] for part in manifest["documents"].values()) == 122
    rejected = [json.loads(line) for line in Path("out/rejected.jsonl").read_text().splitlines()]
    assert {(Path(row["file"]).name, row["reason"]) for row in rejected} == {
        ("a.jsonl", "not JSON"),
        ("b.json.gz", "empty"),
        ("c.parquet", "no text in text"),
    }
    assert not Path("out.work").exists()
    said = capsys.readouterr().out
    assert "set aside   3 records: 1 empty, 1 no text in text, 1 not JSON" in said
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1", "--drop_duplicates") == 0
    assert "already prepared" in capsys.readouterr().out
    assert mmrec("prepare", "--verify", "--output_dir", "out") == 0
    assert mmrec("prepare", "mine", "--output_dir", "out") == 2
    assert "already holds another corpus" in capsys.readouterr().err


def test_it_trains_and_writes(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers import fit, last

    make_folder(tmp_path / "mine")
    options = ["--output_dir", "out", "--tokenizer", "bpe", "--vocab_size", "300", "--workers", "1"]
    assert mmrec("prepare", "mine", *options) == 0
    assert open_tokens(Path("out")).tokenizer.vocab_size == 300
    reset = "--model.reset_at_documents=true"
    assert mmrec(*fit(Path("out"), "--trainer.max_steps=3", "--run=r", reset)) == 0
    assert last("r")["global_step"] == 3
    capsys.readouterr()
    assert mmrec("generate", "--run", "r", "--ckpt", "last", "--length", "5", "--prompt", "The") == 0
    written = capsys.readouterr().out
    assert written.startswith("The")
    assert len(written) > len("The\n")


def test_the_result_does_not_depend_on_the_workers(
    mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "mine")
    options = ["--drop_duplicates", "--val_split", "0.3"]
    assert mmrec("prepare", "mine", "--output_dir", "out1", "--workers", "1", *options) == 0
    # Threads that copy side by side, and pieces so small that most documents are cut by them.
    monkeypatch.setattr("mmrec.data.pipeline.merge.BYTES_AT_ONCE", 101)
    monkeypatch.setattr("mmrec.data.pipeline.split.AT_ONCE", 20)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert mmrec("prepare", "mine", "--output_dir", "out3", "--workers", "3", *options) == 0
    assert tokens_of(Path("out1")) == tokens_of(Path("out3"))


def test_a_worker_loads_the_tokenizer_once(mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one loaded leaves 4 MiB behind for good: thousands of shards would outgrow any memory."""
    loaded: list[Any] = []

    def load(state: dict[str, Any]) -> Tokenizer:
        loaded.append(state)
        return load_tokenizer(state)

    monkeypatch.setattr(work, "load_tokenizer", load)
    folder = make_folder(tmp_path / "texts")
    options = ["--tokenizer", "bpe", "--vocab_size", "300", "--workers", "1"]
    assert mmrec("prepare", str(folder), "--output_dir", "out", *options) == 0
    assert len(loaded) == 1


def test_a_worker_reads_the_plan_once(mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every file: read for each of them, a folder of 10,000 took minutes, and one of 100,000 hours."""
    read: list[Path] = []
    read_json = work.read_json

    def read_and_count(path: Path) -> Any:
        read.append(path)
        return read_json(path)

    monkeypatch.setattr(work, "read_json", read_and_count)
    folder = make_folder(tmp_path / "texts")
    assert mmrec("prepare", str(folder), "--output_dir", "out", "--workers", "1") == 0
    assert [path.name for path in read] == [work.PLAN]


def test_more_files_than_tasks(mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "texts")
    with monkeypatch.context() as patched:
        patched.setattr("mmrec.data.pipeline.executors.TASKS_OF_A_WORKER", 2)
        assert mmrec("prepare", str(folder), "--output_dir", "few", "--workers", "1") == 0
    assert mmrec("prepare", str(folder), "--output_dir", "many", "--workers", "1") == 0
    assert tokens_of(Path("few")) == tokens_of(Path("many"))


def test_names_that_are_not_utf_8(mmrec: Command, tmp_path: Path) -> None:
    """As old archives have them: what counts is the text inside."""
    folder = tmp_path / "mine"
    write_json_lines(folder / "a.jsonl", texts(5))
    name = os.fsencode(folder) + b"/caf\xe9.jsonl"
    with open(name, "wb") as file:
        file.write(b'{"text": "One more."}\n{broken\n')
    assert mmrec("prepare", "mine", "--output_dir", "out", "--workers", "1") == 0
    assert open_tokens(Path("out")).manifest["rejected"] == {"not JSON": 1}
    (line,) = Path("out/rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert os.fsencode(json.loads(line)["file"]).endswith(b"/caf\xe9.jsonl")


def test_tokens_that_are_gone_before_they_are_put_together(
    mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mmrec.data.pipeline.plan as preparing

    write_json_lines(tmp_path / "a.jsonl", texts())

    def cut_and_merge(shards: Shards, *rest: Any) -> TokenFolder:
        os.truncate(shards.work / "000000.tokens", 1000)
        return merge(shards, *rest)

    monkeypatch.setattr(preparing, "merge", cut_and_merge)
    assert mmrec("prepare", "a.jsonl", "--output_dir", "out", "--workers", "1") == 2
    assert "000000.tokens: is cut short; delete the work folder and begin anew" in capsys.readouterr().err
    assert not Path("out").exists()


def test_c4_keeps_its_own_validation_files(mmrec: Command, tmp_path: Path) -> None:
    pieces = texts()
    for k in range(2):
        write_json_lines(tmp_path / "c4" / f"c4-train.{k:05d}-of-01024.json.gz", pieces[k:100:2])
    write_json_lines(tmp_path / "c4" / "c4-validation.00000-of-00008.json.gz", [*pieces[100:], pieces[3]])
    assert mmrec("prepare", "c4", "c4", "--output_dir", "out", "--tokenizer", "bytes", "--drop_duplicates") == 0
    tokens = open_tokens(Path("out"))
    assert split_at_separator(tokens, "val") == [*pieces[100:], pieces[3]]
    # The text that is in both is kept where it validates.
    assert sorted(split_at_separator(tokens, "train")) == sorted(set(pieces[:100]) - {pieces[3]})


def test_a_file_cut_short_is_named_and_the_rest_is_kept(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = texts()
    for k in range(3):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl.gz", pieces[k::3])
    good = (tmp_path / "in" / "1.jsonl.gz").read_bytes()
    (tmp_path / "in" / "1.jsonl.gz").write_bytes(good[:-30])
    assert mmrec("prepare", "in", "--output_dir", "out", "--workers", "1") == 2
    error = capsys.readouterr().err
    assert "in/1.jsonl.gz: is cut short or damaged" in error
    assert "Traceback" not in error
    assert {path.name for path in Path("out.work").glob("*.json")} >= {"000000.json", "000002.json"}
    assert not Path("out").exists()
    # A file that has changed since is no part of what was begun; the others are not read again.
    (tmp_path / "in" / "1.jsonl.gz").write_bytes(good)
    assert mmrec("prepare", "in", "--output_dir", "out", "--workers", "1") == 0
    assert "the files have changed: 2 of 3 shards are kept" in capsys.readouterr().out
    assert mmrec("prepare", "in", "--output_dir", "whole", "--workers", "1") == 0
    assert tokens_of(Path("out")) == tokens_of(Path("whole"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_another_request_goes_on_with_what_is_the_same(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: str
) -> None:
    """A wrong --text_field, then the right one, as the message advises; then another file beside it."""
    for name, part in (("b", texts()[:60]), ("c", texts()[60:])):
        write_json_lines(tmp_path / "in" / f"{name}.jsonl", part)
    command = ["prepare", "in", "--workers", "1", "--tokenizer", tokenizer]
    command += ["--vocab_size", "300"] if tokenizer == "bpe" else []
    assert mmrec(*command, "--output_dir", "out", "--text_field", "body") == 2
    assert "the records have text, url: name the text by --text_field" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:

        def stop(*args: object) -> TokenFolder:
            raise KeyboardInterrupt

        patch.setattr("mmrec.data.pipeline.plan.merge", stop)
        assert mmrec(*command, "--output_dir", "out") == 130
        assert "0 of 2 shards are kept" in capsys.readouterr().out
    write_json_lines(tmp_path / "in" / "a.jsonl", ["A text of another file, which is read first."])
    assert mmrec(*command, "--output_dir", "out") == 0
    assert f"{0 if tokenizer == 'bpe' else 2} of 3 shards are kept" in capsys.readouterr().out
    assert mmrec(*command, "--output_dir", "whole") == 0
    assert tokens_of(Path("out")) == tokens_of(Path("whole"))


@pytest.mark.slow
def test_stopped_and_killed_in_the_middle_the_result_is_the_same(mmrec: Command, tmp_path: Path) -> None:
    pieces = texts(600)
    for k in range(12):
        write_json_lines(tmp_path / "in" / f"{k}.jsonl", pieces[k::12] * 30)
    assert mmrec("prepare", "in", "--output_dir", "whole", "--workers", "1") == 0
    command = [sys.executable, "-m", "mmrec", "prepare", "in", "--output_dir", "parts", "--workers", "1"]
    kills = 0
    for wanted, kill in ((1, signal.SIGINT), (3, signal.SIGKILL), (6, signal.SIGKILL), (9, signal.SIGKILL)):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(Path("parts.work").glob("0*.json"))) >= wanted:
                os.killpg(process.pid, kill)
                kills += 1
                break
            time.sleep(0.002)
        _, error = process.communicate()
        if kill == signal.SIGINT:
            assert (process.returncode, error) == (130, "\nmmrec: stopped by Ctrl-C\n")
    assert kills >= 2  # the last ones may come too late on a busy machine
    assert subprocess.run(command, check=False).returncode == 0
    assert tokens_of(Path("parts")) == tokens_of(Path("whole"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["openwebtxt"], "did you mean 'openwebtext'"),
        (["nothing.jsonl"], "no such file or folder"),
        (["c4", "empty"], "no file of a format that is read here"),
        (["a.jsonl", "--tokenizer", "characters"], "needs the whole text at once"),
        (["a.jsonl", "--executor", "spark"], "unknown --executor 'spark'; known: local, ray, slurm"),
        (["a.jsonl", "--workers", "0"], "--workers is 0; it must be at least 1"),
        (["a.jsonl", "--text_field", "body"], "0 documents (set aside: 5 no text in body)"),
        (["a.jsonl", "--val_split", "2"], "it must lie between 0 and 1"),
        (["a.jsonl", "--executor", "slurm"], "needs Slurm's sbatch"),
        (["tiny_shakespeare", "a.jsonl"], "takes no files of yours"),
        (["s4://bucket/x"], "cannot be reached: Protocol not known"),
        (["c.parquet", "--encoding", "cp1252"], "c.parquet is of a format that is UTF-8 (parquet)"),
        (["a.jsonl", "--encoding", "rot13"], "unknown encoding 'rot13'"),
        (["c4", "a.jsonl", "--encoding", "cp1252"], "--encoding is for your own texts, not for 'c4'"),
        (["sample", "--encoding", "cp1252"], "--encoding is for your own texts, not for 'sample'"),
        (["--input_file", "b.txt", "--glob", "*.md"], "--glob is for a folder, not for 'file'"),
        (["a.jsonl", "--mirror", "there"], "--mirror is for the small corpora"),
        (["--input_dir", ".", "--drop_duplicates"], "--drop_duplicates is for large corpora"),
        (["b.txt", "--text_field", "body"], "--text_field is for large corpora"),
        (["sample", "--executor", "ray"], "--executor is for large corpora"),
        (["a.jsonl", "--glob", "*.md"], "--glob is for a folder"),
        (["c4"], "or get c4-train.*.json.gz and c4-validation.*.json.gz, or the tfrecord files elsewhere: mmrec"),
    ],
)
def test_bad_requests(
    mmrec: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    c4 = dataclasses.replace(LARGE_CORPORA["c4"], url="http://127.0.0.1:9/c4")  # no network
    monkeypatch.setitem(LARGE_CORPORA, "c4", c4)
    write_json_lines(tmp_path / "a.jsonl", texts(5))
    (tmp_path / "b.txt").write_text("one text\n")
    (tmp_path / "c.parquet").touch()
    (tmp_path / "empty").mkdir()
    assert mmrec("prepare", *args, "--output_dir", "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_folder_that_cannot_be_read_is_named(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not left out without a word."""
    write_json_lines(tmp_path / "mine" / "a.jsonl", texts(5))
    write_json_lines(tmp_path / "mine" / "private" / "b.jsonl", texts(5))
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if os.fspath(path).endswith("private"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert mmrec("prepare", "mine", "--output_dir", "out") == 2
    assert "mine/private: cannot be read: Permission denied" in capsys.readouterr().err


def test_documents_that_are_no_text_are_set_aside(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": " "}\n{"text": "fine"}\n')
    assert list(documents(Shard("jsonl", str(tmp_path / "a.jsonl")), "text")) == [Rejected("empty", ""), "fine"]
