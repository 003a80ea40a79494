"""Early stopping: training ends when the validation loss no longer falls."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping


class ResumableEarlyStopping(EarlyStopping):
    """Early stopping whose patience is the one asked for now, not the one a resumed checkpoint remembers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})
