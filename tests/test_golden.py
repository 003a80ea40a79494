"""What was true of this program stays true: an old checkpoint, and the course of a training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command, Figure, make_text
from helpers import fit, last, losses
from processes import run

from mmrec import MemoryLM
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.migrations import VERSION
from mmrec.model.ops import dispatch
from mmrec.model.ops.native.build import SWITCH

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "checkpoint-v1.ckpt"
VERSIONS = sorted(DATA.glob("checkpoint-v*.ckpt"))
"""A checkpoint of each format version; beside it, the logits that it gave when it was written."""
OUTPUTS = DATA / "outputs.json"
"""What generate and score gave of the first of them."""
COURSES = [DATA / "course.json", DATA / "course-native.json"]
"""Of a training by torch, and by the compiled kernels, which draw other dropout."""
PROMPT = "1: to be or not"
BATCHES = ["--data.batch_size=2", "--data.seq_len=64"]
"""Of what is stored."""

pytestmark = pytest.mark.reliability


def logits(path: Path) -> torch.Tensor:
    """Return the logits after each character of the prompt."""
    trained = load_model(path)
    tokens = torch.from_numpy(trained.tokenizer.encode(PROMPT).astype("int64"))[None]
    with torch.no_grad():
        found: torch.Tensor = trained.net(tokens, trained.net.zero_state(1))[0][0]
    return found


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.stem)
def test_an_old_checkpoint_still_means_the_same(path: Path, figure: Figure) -> None:
    """Made by ``python tests/test_golden.py``, once for each format version; older ones are kept."""
    assert path.stat().st_size < 200_000
    stored = torch.tensor(json.loads(path.with_suffix(".json").read_text()))
    difference = float((logits(path) - stored).abs().max())
    assert difference < 1e-4
    version = path.stem.removeprefix("checkpoint-v")
    figure(f"a stored checkpoint of format version {version} gives its stored logits", f"within {difference:.0e}")


def test_there_is_a_checkpoint_of_each_version() -> None:
    assert [path.stem for path in VERSIONS] == [f"checkpoint-v{version}" for version in range(1, VERSION + 1)]


def outputs() -> dict[str, Any]:
    """Return a text that the first checkpoint generates from a seed, and its loss on another."""
    model = MemoryLM.load(str(CHECKPOINT))
    text = model.generate(PROMPT, length=80, temperature=0.8, seed=1)
    return {"generate": text, "score": model.read(make_text()[:2000])}


def test_an_old_checkpoint_generates_and_scores_as_ever() -> None:
    stored = json.loads(OUTPUTS.read_text())
    assert outputs() == {"generate": stored["generate"], "score": pytest.approx(stored["score"], abs=1e-5)}


def test_an_old_checkpoint_can_be_trained_on(mmrec: Command, prepared: Path) -> None:
    more = [*BATCHES, "--trainer.max_steps=60", "--trainer.max_epochs=-1", f"--ckpt_path={CHECKPOINT}", "--run=more"]
    assert mmrec(*fit(prepared, *more)) == 0
    assert last("more")["global_step"] == 60


COMMAND = [
    *BATCHES,
    "--trainer.precision=32-true",
    "--trainer.max_steps=50",
    "--trainer.max_epochs=-1",
    "--trainer.log_every_n_steps=1",
]


def without_kernels() -> None:
    os.environ[SWITCH] = "0"


@pytest.mark.slow
@pytest.mark.parametrize("course", COURSES, ids=lambda course: course.stem)
def test_the_course_of_a_training(course: Path, prepared: Path, tmp_path: Path, figure: Figure) -> None:
    is_native = course is COURSES[1]
    if is_native and not dispatch.choose_native():
        pytest.skip("no C compiler")
    courses = []
    for name in ("one", "two"):
        run(tmp_path, *fit(prepared, *COMMAND, f"--run={name}"), prepare=None if is_native else without_kernels)
        courses.append(losses(name, root=tmp_path))
    assert len(courses[0]) == 50
    assert courses[0] == courses[1]
    stored = json.loads(course.read_text())
    worst = max(abs(value - stored[step]) for step, value in courses[0].items())
    # Other processors add in another order, and 50 updates carry the difference on.
    assert worst < 0.01
    figure(
        f"50 updates in two processes, and against the stored {course.stem}", f"equal to the bit; within {worst:.0e}"
    )


if __name__ == "__main__":  # make the data anew: in an empty folder
    from mmrec.cli import main
    from mmrec.data.options import PrepareOptions
    from mmrec.data.prepare import prepare

    Path("text.txt").write_text(make_text())
    prepare(PrepareOptions(input_file=Path("text.txt"), output_dir=Path("tokens"), tokenizer="characters"))
    main(fit(Path("tokens"), *COMMAND, "--run=golden"))
    DATA.mkdir(exist_ok=True)
    newest = DATA / f"checkpoint-v{VERSION}.ckpt"
    newest.write_bytes(Path("lightning_logs/golden/checkpoints/last.ckpt").read_bytes())
    newest.with_suffix(".json").write_text(json.dumps(logits(newest).tolist()))
    OUTPUTS.write_text(json.dumps(outputs()))
    COURSES[dispatch.uses_native()].write_text(json.dumps(list(losses("golden").values())))
