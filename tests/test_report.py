"""A run as a page: whatever state the run is in, whatever its texts hold, and without a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import Command
from helpers import fit

from mmrec.checkpoints.run_log import read_run
from mmrec.core.errors import UserError
from mmrec.report.charts import Line, line_chart, spread_chart, ticks
from mmrec.report.page import render

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of a page: its tags in balance, its text, and whatever it would ask a network for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.requests: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            loads = name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background")
            if loads or name.startswith("on") or "url(" in (value or ""):
                self.requests.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "style" and ("@import" in data or "url(" in data):
            self.requests.append(data)


def check(page: str) -> Page:
    """Return the page, parsed, after making sure that it asks no network for anything and runs nothing."""
    found = Page(page)
    assert found.requests == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert "default-src 'none'" in page
    return found


def write(text: str, events: Path) -> None:
    """Log ``text`` as a sample of the run in the folder ``events``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(events)) as board:
        board.add_text("sample", "\n".join("    " + line for line in text.splitlines()), 10_000)


def test_the_page_of_a_run(mmrec: Command, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = ["--trainer.val_check_interval=7", "--trainer.log_every_n_steps=5"]
    assert mmrec(*fit(prepared, *every, "--trainer.max_steps=21", "--trainer.max_epochs=-1", "--run=a")) == 0
    evil = '<script>alert("x")</script> & <img src=https://example.org/x.png onerror=alert(1)> </pre></table>'
    write(evil, Path("lightning_logs/a"))
    capsys.readouterr()
    assert mmrec("report", "a") == 0
    assert capsys.readouterr().out.startswith("report.html: ")
    source = Path("report.html").read_text(encoding="utf-8")
    page = check(source)
    assert evil in page.text
    run = read_run(Path("lightning_logs/a"))
    updates, loss = min(run.curve("val/loss").items(), key=lambda item: item[1])
    assert list(run.curve("val/loss")) == [7, 14, 21]
    assert f"{loss:.4f} nats/token" in page.text
    assert f"best.ckpt: {loss:.4f} nats/token after {updates} updates" in page.text
    for heading in ("Loss", "Loss by position", "Half-lives of the layers", "Layers", "Samples over time"):
        assert f"<h2>{heading}</h2>" in source
    assert "Reached its end." in page.text
    assert re.search(r"weight_decay\s*0\.1", page.text)
    assert "seeds" in page.text
    assert re.search(r"torch\s*2\.", page.text)
    assert f"data_dir: {prepared}" in page.text
    assert page.tags.count("svg") >= 2 * 5
    assert mmrec("report", "lightning_logs/a", "--output", "other.html") == 0
    check(Path("other.html").read_text(encoding="utf-8"))


def test_a_run_that_was_stopped_before_any_validation(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec.training.callbacks.stop_on_signal import StopOnSignal

    monkeypatch.setattr(StopOnSignal, "_agreed_signal", lambda self, trainer: 15 * (trainer.global_step == 20))
    assert mmrec(*fit(prepared, "--trainer.max_epochs=2", "--run=a")) == 143
    assert mmrec("report", "a") == 0
    page = check(Path("report.html").read_text(encoding="utf-8"))
    assert "Stopped by SIGTERM." in page.text
    assert "No validation has been reached" in page.text
    assert "last.ckpt" in page.text
    monkeypatch.undo()
    monkeypatch.chdir(prepared.parent)
    assert mmrec("fit", "--run=a", "--ckpt_path=last") == 0
    assert mmrec("report", "a") == 0
    page = check(Path("report.html").read_text(encoding="utf-8"))
    assert "No validation has been reached" not in page.text
    assert "Reached its end." in page.text
    assert [line["event"] for line in read_run(Path("lightning_logs/a")).history] == ["start", "end", "start", "end"]


def test_a_run_that_is_still_going_or_was_killed(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_steps=12", "--run=a")) == 0
    history = Path("lightning_logs/a/history.jsonl")
    start, _ = history.read_text().splitlines()
    history.write_text(start + '\n{"event": "end", "ti')  # the machine stopped as it wrote
    page = check(render(read_run(Path("lightning_logs/a"))))
    assert "it is still going, or was killed. It last logged at 20" in page.text
    for path in Path("lightning_logs/a").glob("events*"):
        path.unlink()
    page = check(render(read_run(Path("lightning_logs/a"))))
    assert "It has logged nothing yet." in page.text
    history.unlink()
    assert "How it ended is not known" in check(render(read_run(Path("lightning_logs/a")))).text


def test_a_run_that_failed_says_so(mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrec.training.callbacks.gradients import GradientGuard

    def fail(*_: object) -> None:
        raise UserError("the gradient <is> not finite at step 3")

    monkeypatch.setattr(GradientGuard, "on_before_optimizer_step", fail)
    assert mmrec(*fit(prepared, "--run=a")) == 2
    page = check(render(read_run(Path("lightning_logs/a"))))
    assert "The gradient <is> not finite at step 3." in page.text


def test_what_stopped_early_says_so(mmrec: Command, prepared: Path) -> None:
    never_better = ["--early_stopping.min_delta=100", "--early_stopping.patience=1", "--trainer.max_epochs=9"]
    assert mmrec(*fit(prepared, *never_better, "--run=a")) == 0
    assert "no longer fell" in check(render(read_run(Path("lightning_logs/a")))).text


def test_the_environment_is_that_of_the_training(mmrec: Command, prepared: Path) -> None:
    import torch

    assert mmrec(*fit(prepared, "--trainer.max_steps=2", "--run=a")) == 0
    start = json.loads(Path("lightning_logs/a/history.jsonl").read_text().splitlines()[0])
    assert start["environment"]["torch"] == torch.__version__
    assert start["environment"]["devices"] == "1 x cpu"
    assert start["hyperparameters"]["batch_size"] == 2
    assert start["environment"]["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", start["environment"]["commit"])


@pytest.mark.parametrize("run", ["b", "", "no/such/folder", ".."])
def test_a_run_that_is_not_there(mmrec: Command, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("report", run) == 2
    assert capsys.readouterr().err.startswith(f"mmrec: error: no run '{run}': ")
    assert not Path("report.html").exists()


def test_bad_places_and_configs(mmrec: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lightning_logs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    assert mmrec("report", "a", "--output", "no/such/folder/x.html") == 2
    assert "no/such/folder/x.html: cannot be written: " in capsys.readouterr().err
    assert mmrec("report", "a") == 0  # a run that has only just begun
    check(Path("report.html").read_text(encoding="utf-8"))
    assert mmrec("report", "a", "--output", folder / "config.yaml") == 2
    assert "config.yaml: holds something else than a page; choose another --output" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text() == "seed_everything: 0\n"
    for broken in ("- a\n", "a: [", "\0"):
        (folder / "config.yaml").write_text(broken)
        assert mmrec("report", "a") == 2
        assert "is not the config of a run" in capsys.readouterr().err


def test_charts_show_every_point_where_it_is() -> None:
    chart = str(line_chart([Line("a<b", [(0, 1.0), (50, 3.0), (100, 2.0)], marked=True)], "x & y", "loss"))
    assert "a&lt;b" in chart
    assert "x &amp; y" in chart
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[1][1] < places[2][1] < places[0][1]  # higher values stand higher
    # One point, equal values, values outside of any scale: drawn all the same.
    for points in ([(1, 2.0)], [(0, 0.0), (1, 0.0)], [(1, -1e30), (2, 1e30)], [(1, 1e-30), (10**9, 2e-30)]):
        assert "nan" not in str(line_chart([Line("a", points, faint=True)], "x", "y"))
    assert len(re.findall("<rect", str(spread_chart({"a": [(0, 0.25, 3), (5, 5.25, 1)]}, "x")))) == 2


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.13, 1.94, 4) == pytest.approx([1.2, 1.4, 1.6, 1.8])
    assert ticks(-0.1, 0.1, 4) == pytest.approx([-0.1, -0.05, 0, 0.05, 0.1])
