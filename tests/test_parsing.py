"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "read a.txt --save=a.mem",
        "score a.txt",
        "export --format=safetensors --output_dir=out",
        "serve --port=0",
        "eval length",
        "eval carry --files=[a.txt]",
        "eval context --files=[a.txt]",
        "eval planted",
    ],
)
def test_every_command_finds_its_checkpoint_alike(
    command: str, mmrec: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.split()
    assert mmrec(*words, "--ckpt=last", "--run=x", "--root=y") == 2
    assert capsys.readouterr().err == "mmrec: error: no checkpoint of a run 'x' in y/lightning_logs\n"
    assert mmrec(*words, "--chkpt=x.ckpt") == 2
    assert "did you mean 'ckpt'" in capsys.readouterr().err
    assert mmrec(*words[: 2 if words[0] == "eval" else 1], "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"--{option} " in shown for option in ("ckpt", "run", "root"))
    assert not list(Path().iterdir())
