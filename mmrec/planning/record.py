"""What ``mmrec train`` writes into a run's folder, so that the same line typed again goes on with it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from mmrec.checkpoints.checkpoint import find_intact_checkpoint, read_checkpoint
from mmrec.core.errors import UserError
from mmrec.core.files import write_file

NAME = "plan.json"


@dataclass(frozen=True)
class Record:
    """A training that was begun.

    Attributes:
        data_dir: the token folder, from where the command was typed; an absolute path in what was written before
            0.2.0 was released.
        minutes: of training, with its validations.
        steps: updates that are planned in them; None where its earlier pace decides.
        options: of ``mmrec fit``, but for the text and the limit of time.
        xz: bits per byte that xz makes of the validation text after the training text.
        expected: bits per byte that the plan expected: the first one where no other is known.
        finished: whether its time was used to the end, and what came of it was said.
        asked: minutes that the command was given in all; None in what was written before 0.2.0 was released.
        half_way: bits per byte that were expected half-way; None before, and where nothing can be said.
        reached: seconds of training before the best checkpoint when it was made longer; None where it was not.
        tokens: digest of those that it trains on; None in what was written before 0.2.0 was released.
        came: bits per byte of the best checkpoint when the training last ended; None before.
        is_of_longer: whether ``expected`` is what was expected of the training when it was made longer.
    """

    data_dir: str
    minutes: float
    steps: int | None
    options: list[str]
    xz: float
    expected: float
    finished: bool = False
    asked: float | None = None
    half_way: float | None = None
    reached: float | None = None
    tokens: str | None = None
    came: float | None = None
    is_of_longer: bool = False

    @property
    def expected_is_own(self) -> bool:
        """Whether ``expected`` is what was expected of this training, not of the one before it was made longer."""
        return self.reached is None or self.is_of_longer

    def write(self, run: Path) -> None:
        """Write it into the folder of the run: whole, or not at all."""
        run.mkdir(parents=True, exist_ok=True)
        write_file(run / NAME, json.dumps(asdict(self), indent=1).encode())

    def check(self) -> None:
        """Raise TypeError where a value is of another type than its field, or ValueError where it is not finite."""
        kinds = get_type_hints(Record) | {"options": list}
        for name, value in vars(self).items():
            whole = type(value) is int  # is read of a number that was written by hand
            if not isinstance(value, kinds[name]) and not (whole and isinstance(float(value), kinds[name])):
                raise TypeError(name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(name)
        if not all(isinstance(option, str) for option in self.options):
            raise TypeError("options")


def read_record(run: Path) -> Record | None:
    """Return what was written of a run, or None where it has not begun; UserError where it cannot be read."""
    path = run / NAME
    if not path.exists():
        return None
    try:
        record = Record(**json.loads(path.read_text(encoding="utf-8")))
        record.check()
        return record
    except (ValueError, TypeError):
        raise UserError(f"{path}: is no plan of mmrec train; choose another --run, or delete the run") from None


def read_intact(checkpoint: Path) -> dict[str, Any]:
    """Return what ``checkpoint`` holds; of a damaged ``last.ckpt`` the previous one, from which training goes on."""
    return read_checkpoint(find_intact_checkpoint(checkpoint, says=False), mmap=True, verify=False)


def callback_state(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what was read of a checkpoint about the callback of the class ``name``; empty where there is none."""
    return next((state for key, state in checkpoint["callbacks"].items() if key.startswith(name) and state), {})


def seconds_of(checkpoint: dict[str, Any]) -> float:
    """Return the seconds of training before what was read of a checkpoint, as its limit of time has counted them."""
    return float(callback_state(checkpoint, "TimeLimit").get("seconds", 0.0))


def seconds_trained(checkpoint: Path) -> float:
    """Return the seconds of training before ``checkpoint``, as :func:`read_intact` reads it."""
    return seconds_of(read_intact(checkpoint))
