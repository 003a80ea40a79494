"""Models on the Hugging Face Hub, against a stand-in on the loopback interface: sent, taken, and described."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from hub import Hub, serve_hub
from models import made

from mmrec import MemoryLM
from mmrec.checkpoints.hub import download_model
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.state_file import model_hash
from mmrec.core.errors import UserError
from mmrec.export import hf
from mmrec.tokenizers import BPETokenizer

BEST = "lightning_logs/a/checkpoints/best.ckpt"

# The library's own, where it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of its own, with a token that it takes and a cache of the test's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    with serve_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def test_a_model_goes_to_the_hub_and_comes_back(
    hub: Hub, mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = f"--root={small_root}"
    arguments = ["--format=hf", "--card", "--license=mit", "--push=me/novel", "--output_dir=out", root]
    assert mmrec("export", *arguments) == 0
    assert f"pushed to {hub.address}/me/novel" in capsys.readouterr().out
    assert hub.files["me/novel"] == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert hub.private == {"me/novel"}
    assert hub.tokens == {"Bearer hf_of_the_test"}
    written = []
    for which in (["--ckpt=best", root], ["--ckpt=hf:me/novel"], [f"--ckpt=hf:me/novel@{hub.commit('me/novel')}"]):
        assert mmrec("generate", *which, "--prompt=to be", "--length=40", "--seed=3") == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] == written[2]
    there, here = load_model(download_model("hf:me/novel")), load_model(small_root / BEST)
    assert model_hash(there.net, there.tokenizer) == model_hash(here.net, here.tokenizer)
    assert MemoryLM.load("hf:me/novel").generate("to be", length=9) == MemoryLM.load("out").generate(
        "to be", length=9
    )


def test_training_and_validation_take_one_of_the_hub(
    hub: Hub, mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mmrec("export", "--format=hf", "--push=me/novel", "--output_dir=out", f"--root={small_root}") == 0
    data = [f"--data.data_dir={small_root / 'tokens'}", "--trainer.accelerator=cpu"]
    capsys.readouterr()
    assert mmrec("validate", "--ckpt_path=hf:me/novel", *data, "--trainer.enable_progress_bar=false") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation (carried"))
    assert float(line.split("): ")[1].split(" nats/token")[0]) == pytest.approx(min(_losses(small_root)), abs=1e-3)
    short = ["--trainer.max_steps=1", "--run=b", "--trainer.enable_progress_bar=false"]
    assert mmrec("fit", "--init_from=hf:me/novel", "--model.learning_rate=1e-9", *data, *short) == 0
    begun, given = load_model(Path("lightning_logs/b/checkpoints/last.ckpt")), load_model(small_root / BEST)
    for one, other in zip(begun.net.parameters(), given.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def _losses(root: Path) -> list[float]:
    from mmrec.checkpoints.run_log import read_run

    return list(read_run(root / "lightning_logs/a").curve("val/loss").values())


def test_without_the_network_the_cache_serves(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.save(tmp_path / "out", trained := made(BPETokenizer.train("the end " * 50, 270, documents=True)))
    hub.files["me/it"] = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    path = download_model("hf:me/it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")  # where nobody listens
        assert download_model("hf:me/it") == path
        back = load_model(path)
        assert model_hash(back.net, back.tokenizer) == model_hash(trained.net, trained.tokenizer)
        with pytest.raises(UserError, match="hf:me/other: the Hub cannot be reached"):
            download_model("hf:me/other")


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("hf:me/nothing", "no such repository, or none that you may use: log in by 'hf auth login'"),
        ("hf:me/it@v9", "there is no such revision"),
        ("hf:me/it", "holds no model.safetensors with a mmrec.json"),
        ("hf:it", "is not hf:OWNER/NAME"),
        ("hf:", "is not hf:OWNER/NAME"),
    ],
)
def test_what_is_not_there_is_one_line(
    hub: Hub, mmrec: Command, which: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files["me/it"] = {"config.json": b"{}"}
    assert mmrec("generate", "--ckpt", which) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"mmrec: error: {which}: ")
    assert says in error


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    hf.save(tmp_path, made(BPETokenizer.train("the end " * 50, 270)))
    path, described = tmp_path / "model.safetensors", json.loads((tmp_path / "mmrec.json").read_text())
    assert load_model(path).step == 5
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged, or not the weights that"):
        load_model(path)
    path.write_bytes(whole)
    for key in described:
        wrong = {name: value for name, value in described.items() if name != key}
        (tmp_path / "mmrec.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"mmrec\.json: does not describe a model"):
            load_model(path)
    (tmp_path / "mmrec.json").write_text(json.dumps(described | {"version": "9"}))
    with pytest.raises(UserError, match="is of version 9; this program reads 1"):
        load_model(path)


def test_a_push_that_fails_leaves_the_folder(
    hub: Hub, mmrec: Command, small_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--format=hf", "--output_dir=out", f"--root={small_root}"]
    assert mmrec("export", *arguments, "--push=no owner") == 2
    assert "--push no owner: is not OWNER/NAME" in capsys.readouterr().err
    assert not Path("out").exists()
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.delenv("HF_TOKEN")
    assert mmrec("export", *arguments, "--push=me/novel") == 2
    assert "out was written, but not pushed to me/novel: " in capsys.readouterr().err
    assert not hub.files
    assert load_model(Path("out/model.safetensors")).step > 0


# The card


def test_the_card_says_what_the_run_knows(mmrec: Command, small_root: Path) -> None:
    assert (
        mmrec("export", "--format=hf", "--card", "--license=cc-by-4.0", "--output_dir=out", f"--root={small_root}")
        == 0
    )
    card = Path("out/README.md").read_text(encoding="utf-8")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["license"] == "cc-by-4.0"
    assert yaml.safe_load(head)["library_name"] == "transformers"
    losses = _losses(small_root)
    best = re.search(r"\| loss \| ([\d.]+) nats/token, after [\d,]+ updates \|", body)
    assert best is not None
    assert float(best[1]) == pytest.approx(min(losses), abs=1e-4)
    assert "read once from its beginning to its end with the state carried" in body
    curve = re.findall(r"^\| [\d,]+ \| (\d+\.\d{4}) \|$", body, re.MULTILINE)
    assert [float(loss) for loss in curve] == pytest.approx(losses, abs=1e-4)
    manifest = json.loads((small_root / "tokens/manifest.json").read_text())
    sizes = manifest["tokens"]["train"], manifest["files"]["train.txt"]["bytes"]
    for expected in (
        f"| parameters | {load_model(small_root / BEST).net.parameter_count():,} |",
        "| text | the file text.txt |",
        f"| training text | {sizes[0]:,} tokens, {sizes[1]:,} bytes |",
        f"| split | {100 * manifest['split']['val_split']:g} % for validation: the last part of the text |",
        "## Intended use and limits",
        "`cc-by-4.0`.",
        'AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
    ):
        assert expected in body
    assert "\n\n\n" not in body


def test_the_code_of_a_card_runs(mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("export", "--format=hf", "--card", "--output_dir=out", f"--root={small_root}") == 0
    card = Path("out/README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert program is not None
    capsys.readouterr()
    exec(program[1].replace("FOLDER", "out").replace("It was", "to be").replace("=200", "=9"), {})
    assert capsys.readouterr().out.startswith("to be")


def test_a_card_without_a_run_says_so(mmrec: Command, small_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("export", "--format=safetensors", "--output_dir=one", f"--root={small_root}") == 0
    assert mmrec("export", "--format=hf", "--card", "--ckpt=one/model.safetensors", "--output_dir=out") == 0
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "Not known: this card was written without the folder of the training run." in card
    assert "None were recorded." in card
    assert "license: unknown" in card
    assert mmrec("export", "--format=onnx", "--card", "--output_dir=x", f"--root={small_root}") == 2
    assert "--card: it says how to load a model in transformers; --format onnx has none" in capsys.readouterr().err
    assert mmrec("export", "--format=hf", "--license=mit", "--output_dir=x", f"--root={small_root}") == 2
    assert "--license: it stands in the card; add --card" in capsys.readouterr().err
