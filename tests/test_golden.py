"""What was true of this program stays true: an old checkpoint, and the course of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command, Figure, make_text
from helpers import fit, last, losses
from processes import run

from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.migrations import VERSION

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "checkpoint-v1.ckpt"
COURSE = DATA / "course.json"
PROMPT = "1: to be or not"
BATCHES = ["--data.batch_size=2", "--data.seq_len=64"]
"""Of what is stored."""

pytestmark = pytest.mark.reliability


def logits(path: Path) -> torch.Tensor:
    """Return the logits after each character of the prompt."""
    trained = load_model(path)
    tokens = torch.from_numpy(trained.tokenizer.encode(PROMPT).astype("int64"))[None]
    with torch.no_grad():
        return trained.net(tokens, trained.net.zero_state(1))[0][0]


def test_an_old_checkpoint_still_means_the_same(figure: Figure) -> None:
    """Made by ``python tests/test_golden.py``, once for each format version; older ones are kept."""
    assert VERSION == 2, "keep these files' checkpoints, add one of the new version, and test all"
    assert CHECKPOINT.stat().st_size < 200_000
    stored = torch.tensor(json.loads(CHECKPOINT.with_suffix(".json").read_text()))
    difference = float((logits(CHECKPOINT) - stored).abs().max())
    assert difference < 1e-4
    figure("a stored checkpoint of format version 1 gives its stored logits", f"within {difference:.0e}")


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


@pytest.mark.slow
def test_the_course_of_a_training(prepared: Path, tmp_path: Path, figure: Figure) -> None:
    courses = []
    for name in ("one", "two"):
        run(tmp_path, *fit(prepared, *COMMAND, f"--run={name}"))
        courses.append(losses(name, root=tmp_path))
    assert len(courses[0]) == 50
    assert courses[0] == courses[1]
    stored = json.loads(COURSE.read_text())
    worst = max(abs(value - stored[step]) for step, value in courses[0].items())
    # Other processors add in another order, and 50 updates carry the difference on.
    assert worst < 0.01
    figure("50 updates in two processes, and against the stored course", f"equal to the bit; within {worst:.0e}")


if __name__ == "__main__":  # make the data anew: in an empty folder
    from mmrec.cli import main
    from mmrec.data.options import PrepareOptions
    from mmrec.data.prepare import prepare

    Path("text.txt").write_text(make_text())
    prepare(PrepareOptions(input_file=Path("text.txt"), output_dir=Path("tokens"), tokenizer="characters"))
    main(fit(Path("tokens"), *COMMAND, "--run=golden"))
    DATA.mkdir(exist_ok=True)
    CHECKPOINT.write_bytes(Path("lightning_logs/golden/checkpoints/last.ckpt").read_bytes())
    CHECKPOINT.with_suffix(".json").write_text(json.dumps(logits(CHECKPOINT).tolist()))
    COURSE.write_text(json.dumps(list(losses("golden").values())))
