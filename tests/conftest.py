"""Shared by the tests: fixed seeds, a small text, and runs in a folder of their own."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from phantom.plugin import pytest_runtest_protocol  # noqa: F401 -- a hook of pytest

from mmrec.core.lazy_imports import put_off_metrics

if TYPE_CHECKING:
    from serving import Client

    from mmrec.checkpoints.loading import LoadedModel

REPOSITORY = Path(__file__).parent.parent
SHAKESPEARE = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt"

put_off_metrics()  # as every command does: Lightning is imported three seconds sooner
# What runs in the background ignores Ctrl-C, and so would the commands that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Google's client, wherever it is first imported, would ask Google about a bucket of the tests: for minutes.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# Servers of the tests are here, also where the machine is behind a proxy.
os.environ["no_proxy"] = ",".join(filter(None, ("127.0.0.1", "localhost", os.environ.get("no_proxy"))))


def pytest_collection_finish() -> None:
    """Let collections of garbage leave alone what all modules have made: each took a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # a training sets it for its process; hypothesis draws such numbers


def silence_lightning() -> None:
    """Take away the handlers of Lightning's loggers, where it has been imported."""
    logging.getLogger("lightning.pytorch").handlers.clear()
    logging.getLogger("lightning.fabric").handlers.clear()


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """A training that begins in this process leaves variables that say it is one of several."""
    before = dict(os.environ)
    yield
    for name in {*os.environ} - {*before}:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def lightning_talks_to_the_test() -> None:
    """Lightning's handler keeps the standard error of the test that imported it, which is closed in the others."""
    silence_lightning()


Command = Callable[..., int]
"""What the fixture ``mmrec`` is: a command's arguments in, its exit status out."""

FIGURES = os.environ.get("MMREC_FIGURES")
"""Where ./scripts/reliability wants its figures; only there is everything repeated as often as its table says."""
Figure = Callable[[str, str], None]


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Notes what a test measured of a promise, for the table that ./scripts/reliability makes."""

    def note(promise: str, value: str) -> None:
        if FIGURES is not None:
            row = {"promise": promise, "test": request.node.nodeid, "figure": value}
            with open(FIGURES, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return note


def make_text() -> str:
    """Return 12,000 characters with something to learn: numbered lines of a small vocabulary."""
    words = ["to", "be", "or", "not", "that", "is", "the", "question"]
    choose = random.Random(1)
    lines = (f"{i}: " + " ".join(choose.choices(words, k=8)) for i in range(400))
    return "\n".join(lines)[:12_000]


@pytest.fixture
def text() -> str:
    return make_text()


@pytest.fixture
def prepared(tmp_path: Path, text: str) -> Path:
    """A token folder of ``text``, by characters, with a fifth for validation."""
    from mmrec.data.options import PrepareOptions
    from mmrec.data.prepare import prepare

    source = tmp_path / "text.txt"
    source.write_text(text, encoding="utf-8")
    prepare(PrepareOptions(input_file=source, output_dir=tmp_path / "tokens", tokenizer="characters"))
    return tmp_path / "tokens"


@pytest.fixture
def mmrec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process, in ``tmp_path``; returns its exit status."""
    import lightning.pytorch  # noqa: F401 -- makes the handlers

    from mmrec.cli import main

    silence_lightning()

    monkeypatch.chdir(tmp_path)

    def command(*args: object) -> int:
        try:
            return main([str(arg) for arg in args])
        except SystemExit as stop:
            return int(stop.code or 0)

    return command


@pytest.fixture
def run_on_devices() -> Callable[..., str]:
    """``processes.run`` in processes that each have a simulated CUDA device, one of as many as there are ranks."""
    from phantom import build, cuda
    from processes import run

    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    return partial(run, prepare=cuda.install_rank)


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run "a", trained for three epochs. Not to be changed."""
    from helpers import fit

    from mmrec.cli import main

    folder = tmp_path_factory.mktemp("small")
    (folder / "text.txt").write_text(make_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["prepare", "--input_file=text.txt", "--output_dir=tokens", "--tokenizer=characters"]) == 0
        assert main(fit(folder / "tokens", "--trainer.max_epochs=3", "--run=a")) == 0
    return folder


@pytest.fixture
def small_model(small_root: Path) -> LoadedModel:
    """The model of that run."""
    from mmrec.checkpoints.loading import load_model

    return load_model(small_root / "lightning_logs/a/checkpoints/best.ckpt")


@pytest.fixture
def memories(tmp_path: Path) -> Path:
    """Where the server of ``client`` keeps its named memories."""
    return tmp_path / "memories"


@pytest.fixture
def client(small_model: LoadedModel, memories: Path) -> Iterator[Client]:
    """Asks a server of that model."""
    from serving import make_service, running

    with running(make_service(small_model, memories)) as client:
        yield client


@pytest.fixture
def novel(tmp_path: Path, text: str) -> Path:
    """A text of one's own."""
    path = tmp_path / "novel.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def quick_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial of the machine by mmrec train gives two models without being made; it has tests of its own."""
    from mmrec.planning import command
    from mmrec.planning.plan import Candidate, Rate, Text

    def measure(_: Text, candidates: list[Candidate], *__: object) -> list[Rate]:
        return [Rate(each, tokens) for each, tokens in zip(candidates, (3000.0, 0.01), strict=False)]

    monkeypatch.setattr(command, "measure_rates", measure)
