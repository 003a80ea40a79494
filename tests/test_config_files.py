"""What a config file must be, before its options are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Command
from helpers import fit

REFUSED = {
    "a section twice": (
        b"model: {learning_rate: 0.1}\ntrainer: {}\nmodel:\n  dropout: 0.1\n",
        "gives 'model' twice, in lines 1 and 3",
    ),
    "an option twice": (b"model:\n  dropout: 0.1\n  dropout: 0.2\n", "gives 'dropout' twice, in lines 2 and 3"),
    "twice in JSON": (b'{"model": {"dropout": 0.1, "dropout": 0.1}}', "gives 'dropout' twice"),
    "twice in a list": (
        b"trainer:\n  callbacks:\n  - class_path: A\n    class_path: B\n",
        "gives 'class_path' twice",
    ),
    "a blank section": (b"trainer:\nmodel: {dropout: 0.1}\n", "the section 'trainer' is empty"),
    "a section of null": (b"early_stopping: null\n", "the section 'early_stopping' is empty"),
    "a section of a number": (b"trainer: 3\n", "the section 'trainer' holds no options; write them as {name: value}"),
    "a section of a list": (b"trainer: [max_steps]\n", "the section 'trainer' holds no options"),
    "Latin-1": ("# \u00dcbung\ntrainer: {max_steps: 3}\n".encode("latin-1"), "is not UTF-8 at byte 2"),
    "nothing": (b"", "is empty"),
    "only a comment": (b"# trainer: {max_steps: 3}\n", "is empty"),
    "a list": (b"- trainer\n", "holds no options"),
    "a tab": (
        b"trainer:\n\tmax_steps: 3\n",
        "is not YAML: found character '\\t' that cannot start any token (line 2,",
    ),
    "two documents": (b"trainer: {}\n---\nmodel: {}\n", "is not YAML: but found another document (line 2,"),
}


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_a_config_of_which_a_part_would_be_lost_is_refused(
    content: bytes, says: str, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_bytes(content)
    for given in (["-c", "mine.yaml"], ["--config=mine.yaml"]):
        assert mmrec("fit", *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mmrec: error: mine.yaml: ")
        assert says in line
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_numbers_marks_and_line_ends_are_read_as_people_write_them(prepared: Path, mmrec: Command) -> None:
    text = "trainer:\n  max_steps: '10'\n  limit_val_batches: 0\n"
    text += "model: {learning_rate: 1e-3, weight_decay: .5, warmup_steps: 1_0}\n"
    Path("mine.yaml").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert mmrec(*fit(prepared, "-c", "mine.yaml", "--run=a")) == 0
    saved = yaml.safe_load(Path("lightning_logs/a/config.yaml").read_text(encoding="utf-8"))
    assert (saved["trainer"]["max_steps"], saved["model"]["warmup_steps"]) == (10, 10)
    assert (saved["model"]["learning_rate"], saved["model"]["weight_decay"]) == (0.001, 0.5)
    assert saved["trainer"]["gradient_clip_val"] == 1.0  # what a file does not name keeps its default


def test_a_mapping_without_spaces_is_explained(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("fit", "--model.config={dim:16,layers:2}") == 2
    assert capsys.readouterr().err.endswith("; in YAML a space stands after a colon: {dim: 16}\n")


@pytest.mark.parametrize("name", ["model.dropout", "model.config.dim", "data.seq_len", "trainer.num_nodes"])
def test_an_option_that_needs_a_value_is_not_null(
    name: str, prepared: Path, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = name.split(".")
    Path("mine.yaml").write_text(": {".join(keys) + ": null" + "}" * (len(keys) - 1))
    assert mmrec(*fit(prepared, "-c", "mine.yaml")) == 2
    assert capsys.readouterr().err == f"mmrec: error: --{name} is null; give it a value, or leave it out\n"


@pytest.mark.parametrize("name", ["1e5", "007", "1_000", ".5", "yes", "[a]", "a: b", "2024-01-01"])
def test_names_that_look_like_yaml_are_taken_as_typed(
    name: str, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate"], ["fit", "--ckpt_path=last"]):
        assert mmrec(*command, f"--run={name}") == 2
        assert f"no checkpoint of a run {name!r} in lightning_logs" in capsys.readouterr().err
