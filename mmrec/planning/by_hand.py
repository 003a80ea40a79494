"""Options of ``mmrec fit`` that are given by hand: they win over a plan, and it is made for what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from mmrec.core.errors import UserError
from mmrec.model import ModelConfig, layer_parameters
from mmrec.planning.options import value_of
from mmrec.planning.plan import Batches, Candidate, Text, choose_batches, shapes_for
from mmrec.training.compat import most_processes
from mmrec.training.fit_config import count_devices, fit_config
from mmrec.training.options import DataOptions, TrainingOptions

MODEL, ROWS, SEQ_LEN, INTERLEAVE = "--model.config", "--data.batch_size", "--data.seq_len", "--data.interleave"
STEPS, EPOCHS = "--trainer.max_steps", "--trainer.max_epochs"
PROCESSES = DEVICES, STRATEGY = "--trainer.devices", "--trainer.strategy"


@dataclass(frozen=True)
class ByHand:
    """What options of ``mmrec fit`` leave a plan to decide.

    Args:
        options: as they were typed.
        device: type of what it is trained on, as torch names it.

    Raises:
        UserError: one is none of ``mmrec fit``, or has a value that it cannot have.
    """

    options: Sequence[str] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.options:
            return
        given = self._config
        DataOptions(**vars(given.data))
        TrainingOptions(**{field.name: given.model[field.name] for field in fields(TrainingOptions)})
        for name, value in ((STEPS, given.trainer.max_steps), (EPOCHS, given.trainer.max_epochs)):
            if value is not None and value < 1 and value != -1:
                raise UserError(f"{name} is {value}; it must be at least 1, or -1 for no limit")
        devices = self._devices or 1
        if self.device == "cpu" and devices > most_processes():
            raise UserError(
                f"{DEVICES} is {devices}; it must be from 1 to {most_processes()}, as there are CPU cores"
            )

    def candidates(self, text: Text) -> list[Candidate]:
        """Return the models that a plan for ``text`` chooses from, the smallest first, with the batches of each.

        Raises:
            UserError: no shape can be what was given of the model, or no batch what was given of it.
        """
        configs = [*shapes_for(text)]
        if self._has(MODEL):
            configs = self._changed(configs)
        return [self.candidate(config, text) for config in configs]

    def candidate(self, config: ModelConfig, text: Text, tokens: int = 0) -> Candidate:
        """Return a model with its batches, for a training that reads so many ``tokens`` in all where that is planned.

        Raises:
            UserError: no batch can be what was given of it.
        """
        planned = choose_batches(config, text.train_tokens // self.copies, tokens // self.copies)
        return Candidate(config, self._batches(replace(planned, copies=self.copies), text))

    def most_steps(self, batches: Batches, text: Text) -> int | None:
        """Return the updates that were given as the most, or those of the epochs; None where neither was."""
        if not self._has(STEPS, EPOCHS):
            return None
        limits = [] if self.max_steps is None else [self.max_steps]
        epochs = self._config.trainer.max_epochs or -1
        if self._has(EPOCHS) and epochs > 0:
            limits.append(epochs * -(-text.train_tokens // batches.tokens))  # the last batch of each may be smaller
        return min(limits, default=None)

    @property
    def max_steps(self) -> int | None:
        """The most updates, where they were given."""
        return self._config.trainer.max_steps if self._has(STEPS) and self._config.trainer.max_steps > 0 else None

    @property
    def processes(self) -> int | None:
        """The processes that share out the rows of an update, where they were given; None where they were not."""
        return self._devices if self._shares_rows else 1

    @property
    def copies(self) -> int:
        """The processes that each have all the rows of an update: those of another strategy than ``cores``."""
        return 1 if self._shares_rows else self._devices or 1

    @property
    def _shares_rows(self) -> bool:
        strategy = value_of(self.options, STRATEGY)
        return strategy == "cores" or (strategy is None and (self.device == "cpu" or self._devices is None))

    @cached_property
    def _devices(self) -> int | None:
        return count_devices(self._config.trainer.devices, self.device) if self._has(DEVICES) else None

    @cached_property
    def _config(self) -> Any:
        return fit_config(self.options)

    def _has(self, *names: str) -> bool:
        return any(option.startswith(names) for option in self.options)

    def _changed(self, configs: Sequence[ModelConfig]) -> list[ModelConfig]:
        """Return what becomes of ``configs``, each once, the smallest first, without those that cannot be."""
        changed: list[ModelConfig] = []
        refused: UserError | None = None
        for config in configs:
            given: Any = fit_config([f"{MODEL}={json.dumps(asdict(config))}", *self.options]).model.config
            try:
                made = ModelConfig(**{name: _fixed(value) for name, value in vars(given).items()})
            except UserError as error:
                refused = error
                continue
            if made not in changed:
                changed.append(made)
        if not changed:
            assert refused is not None
            raise refused
        return sorted(changed, key=layer_parameters)

    def _batches(self, planned: Batches, text: Text) -> Batches:
        names = {ROWS: "rows", SEQ_LEN: "seq_len", INTERLEAVE: "interleave"}
        given = {field: self._config.data[name.partition(".")[2]] for name, field in names.items() if self._has(name)}
        batches = replace(planned, **given)
        if batches.seq_len >= text.train_tokens:
            raise UserError(f"{SEQ_LEN} is {batches.seq_len}; it must be less than the {text.train_tokens:,} tokens")
        if self.processes is not None and batches.rows % self.processes:
            raise UserError(
                f"{DEVICES} is {self.processes}, which cannot share out the {batches.rows} rows of an update evenly; "
                f"give a divisor of them, or another {ROWS}"
            )
        return batches


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
