"""Options of ``mmrec fit`` that are given by hand: they win over a plan, and it is made for what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mmrec.core.errors import UserError
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.options import value_of
from mmrec.planning.plan import Batches, Candidate, Text, choose_batches, shapes_for
from mmrec.training.fit_config import fit_config
from mmrec.training.options import DataOptions

MODEL, ROWS, SEQ_LEN, INTERLEAVE = "--model.config", "--data.batch_size", "--data.seq_len", "--data.interleave"
STEPS, EPOCHS = "--trainer.max_steps", "--trainer.max_epochs"
PROCESSES = DEVICES, STRATEGY = "--trainer.devices", "--trainer.strategy"
ACCUMULATED = "--trainer.accumulate_grad_batches"


@dataclass(frozen=True)
class ByHand:
    """What options of ``mmrec fit`` leave a plan to decide.

    Args:
        options: as they were typed.

    Raises:
        UserError: one is none of ``mmrec fit``, or has a value that it cannot have.
    """

    options: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.options:
            DataOptions(**vars(fit_config(self.options).data))

    def candidates(self, text: Text) -> list[Candidate]:
        """Return the models that a plan for ``text`` chooses from, the smallest first, with the batches of each.

        Raises:
            UserError: no shape can be what was given of the model.
        """
        configs = [*shapes_for(text)]
        if self._has(MODEL):
            configs = self._changed(configs)
        return [Candidate(config, self._batches(config, text)) for config in configs]

    def most_steps(self, batches: Batches, text: Text) -> int | None:
        """Return the updates that were given as the most, or those of the epochs; None where neither was."""
        if not self._has(STEPS, EPOCHS):
            return None
        given, limits = fit_config(self.options).trainer, []
        if self._has(STEPS) and given.max_steps >= 0:
            limits.append(given.max_steps)
        if self._has(EPOCHS) and (given.max_epochs or -1) >= 0:
            limits.append(given.max_epochs * text.train_tokens // batches.tokens)
        return max(1, min(limits)) if limits else None

    @property
    def processes(self) -> int | None:
        """The processes that share out the rows of an update, where they were given; None leaves them to a plan."""
        devices, strategy = (value_of(self.options, name) for name in PROCESSES)
        given = devices is not None and devices.isdecimal() and strategy in (None, "auto", "cores")
        return max(1, int(devices or 1)) if given else None

    @property
    def is_tried(self) -> bool:
        """Whether an update is what a trial of the machine makes."""
        return not self._has(ACCUMULATED) and (self.processes is not None or not self._has(*PROCESSES))

    def _has(self, *names: str) -> bool:
        return any(option.startswith(names) for option in self.options)

    def _changed(self, configs: Sequence[ModelConfig]) -> list[ModelConfig]:
        """Return what becomes of ``configs``, each once, the smallest first, without those that cannot be."""
        changed: list[ModelConfig] = []
        refused: UserError | None = None
        for config in configs:
            fields: dict[str, Any] = fit_config([f"{MODEL}={json.dumps(asdict(config))}", *self.options]).model.config
            try:
                made = ModelConfig(**{name: _fixed(value) for name, value in vars(fields).items()})
            except UserError as error:
                refused = error
                continue
            if made not in changed:
                changed.append(made)
        if not changed:
            assert refused is not None
            raise refused
        return sorted(changed, key=layer_parameters)

    def _batches(self, config: ModelConfig, text: Text) -> Batches:
        planned = choose_batches(config, text.train_tokens)
        if not self._has(ROWS, SEQ_LEN, INTERLEAVE):
            return planned
        values = {ROWS: planned.rows, SEQ_LEN: planned.seq_len, INTERLEAVE: planned.interleave}
        data = fit_config([*(f"{name}={value}" for name, value in values.items()), *self.options]).data
        return replace(planned, rows=data.batch_size, seq_len=data.seq_len, interleave=data.interleave)


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
