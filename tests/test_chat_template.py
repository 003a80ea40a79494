"""A chat template is part of a checkpoint, from the training to the server and to transformers."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from helpers import checkpoints, fit, last
from models import TEXT, made

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.checkpoints.checkpoint import write_checkpoint
from mmrec.checkpoints.contents import MODEL_KEY
from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.serve import command
from mmrec.tokenizers import CharacterTokenizer

DIALOGUE = ChatTemplate("{role}: {content} 'quoted' \\ é🙂", "\n--\n", "assistant: ")
MESSAGES = [("system", "to be"), ("user", "{content} {role}\n{{ 7 }}"), ("tool", "")]


def chat_of(run: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = last(run)[MODEL_KEY].get("chat")
    return found


def test_fit_saves_it_and_resuming_and_init_from_keep_it(
    mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    assert mmrec(*fit(prepared, *short, "--run=plain")) == 0
    assert chat_of("plain") is None
    typed = ["--chat.message={role}: {content}", "--chat.separator=\\n", "--chat.reply", "# assistant: "]
    assert mmrec(*fit(prepared, *short, "--run=a", *typed)) == 0
    saved = {"message": "{role}: {content}", "separator": "\n", "reply": "# assistant: "}
    assert chat_of("a") == saved
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=2", "--chat.reply=you: ") == 0
    assert chat_of("a") == saved | {"reply": "you: "}
    assert "chat.reply # assistant:  -> you: " in caplog.text
    assert mmrec(*fit(prepared, *short, "--run=b", f"--init_from={checkpoints('a') / 'last.ckpt'}")) == 0
    assert chat_of("b") == saved | {"reply": "you: "}
    assert mmrec("fit", "--run=b", "--ckpt_path=last", "--trainer.max_steps=2") == 0
    assert chat_of("b") == saved | {"reply": "you: "}
    capsys.readouterr()
    assert mmrec(*fit(prepared, *short, "--run=c", "--chat.message=hello")) == 2
    assert "--chat.message is 'hello'; it must have {content} in it" in capsys.readouterr().err
    assert not Path("lightning_logs/c").exists()


def written(chat: ChatTemplate | None, path: Path) -> LoadedModel:
    """Write a checkpoint of a made model with the template ``chat``; return the model as it is loaded."""
    trained = made(CharacterTokenizer(TEXT + "{content}:role >systemtaub7"))
    described = {"version": 2, "shape": trained.net.config.as_dict(), "tokenizer": trained.tokenizer.state()}
    weights = {f"net.{name}": weight for name, weight in trained.net.state_dict().items()}
    described |= {} if chat is None else {"chat": asdict(chat)}
    write_checkpoint({MODEL_KEY: described, "state_dict": weights, "global_step": 5}, path)
    return load_model(path)


def test_an_export_carries_it(mmrec: Command, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    assert written(DIALOGUE, tmp_path / "a.ckpt").chat == DIALOGUE
    assert mmrec("export", "--ckpt=a.ckpt", "--format=safetensors", "--output_dir=one") == 0
    assert load_model(tmp_path / "one/model.safetensors").chat == DIALOGUE
    hf = ("export", "--ckpt=one/model.safetensors", "--format=hf", "--output_dir=hf")
    assert mmrec(*hf) == 0
    assert mmrec(*hf, "--force") == 0  # the file of the template is one of an export
    tokenizer = transformers.AutoTokenizer.from_pretrained("hf", local_files_only=True)
    chat = [{"role": role, "content": content} for role, content in MESSAGES]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == DIALOGUE.render(MESSAGES)
    parts = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in chat]
    assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == rendered
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole + DIALOGUE.reply == rendered
    written(None, tmp_path / "b.ckpt")
    assert mmrec("export", "--ckpt=b.ckpt", "--format=hf", "--output_dir=plain") == 0
    assert transformers.AutoTokenizer.from_pretrained("plain", local_files_only=True).chat_template is None


def test_serve_takes_it_and_its_own_options_win(
    mmrec: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[ChatTemplate] = []
    done = threading.Event()

    class Server:
        def __init__(self, service: object, access: object, template: ChatTemplate) -> None:
            taken.append(template)

        def run(self, sockets: object) -> None:
            done.set()

    monkeypatch.setattr(command, "Server", Server)
    written(DIALOGUE, tmp_path / "a.ckpt")
    written(None, tmp_path / "b.ckpt")
    assert mmrec("serve", "--ckpt=a.ckpt", "--port=0") == 0
    assert mmrec("serve", "--ckpt=a.ckpt", "--port=0", "--chat.separator=\\n") == 0
    assert mmrec("serve", "--ckpt=b.ckpt", "--port=0") == 0
    assert taken == [DIALOGUE, ChatTemplate(DIALOGUE.message, "\n", DIALOGUE.reply), ChatTemplate()]
    assert done.is_set()


@pytest.mark.parametrize("chat", [5, {"message": "no content"}, {"colour": "red"}, {"reply": None}])
def test_a_damaged_template_is_said(
    mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: Any
) -> None:
    trained = made(CharacterTokenizer("abc"))
    described = {"version": 2, "shape": trained.net.config.as_dict(), "tokenizer": trained.tokenizer.state()}
    weights = {f"net.{name}": weight for name, weight in trained.net.state_dict().items()}
    content = {MODEL_KEY: described | {"chat": chat}, "state_dict": weights, "global_step": 5}
    write_checkpoint(content, tmp_path / "a.ckpt")
    assert mmrec("generate", "--ckpt=a.ckpt") == 2
    assert "a.ckpt: holds no model that can be used" in capsys.readouterr().err
