"""Old checkpoints in the present form: one function a format version, each bringing it to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrec.core.errors import UserError

VERSION = 2
"""The format version that this program writes."""

RENAMED_OPTIONS = {"second_token": "mtp_loss_weight", "final_lr_share": "min_lr_ratio"}
RENAMED_CALLBACKS = {"Patience": "ResumableEarlyStopping"}
RENAMED_MODULES = {"second.": "mtp_head."}


def from_version_1(checkpoint: dict[str, Any], key: str, progress_key: str) -> None:
    """Version 1 had other names for two options, a callback and the head of multi-token prediction."""
    if progress_key in checkpoint:
        options = checkpoint[progress_key]["hyperparameters"]
        checkpoint[progress_key]["hyperparameters"] = {RENAMED_OPTIONS.get(k, k): v for k, v in options.items()}
    callbacks = checkpoint.get("callbacks")
    if callbacks is not None:  # Lightning's key of a callback: the name of its class, and some of its arguments
        checkpoint["callbacks"] = {_renamed(k, RENAMED_CALLBACKS): v for k, v in callbacks.items()}
    for weights in ("state_dict", "current_model_state"):  # the second beside an EMA of the weights
        if weights in checkpoint:
            checkpoint[weights] = {_renamed(k, RENAMED_MODULES): v for k, v in checkpoint[weights].items()}
    checkpoint[key]["version"] = 2


MIGRATIONS: dict[int, Callable[[dict[str, Any], str, str], None]] = {1: from_version_1}


def migrate(checkpoint: dict[str, Any], key: str, progress_key: str) -> dict[str, Any]:
    """Return ``checkpoint`` in the form of :data:`VERSION`, changed in place; "written_as" then says its own version.

    Args:
        checkpoint: as it was written.
        key: of the part that describes the model, and says the version.
        progress_key: of the part that only resuming needs.

    Raises:
        UserError: it is of a version that this program does not know.
    """
    version = checkpoint[key].get("version")
    checkpoint[key]["written_as"] = version
    while version != VERSION:
        if not isinstance(version, int) or version not in MIGRATIONS:
            raise UserError(f"checkpoint format version {version}; this program reads 1 to {VERSION}")
        MIGRATIONS[version](checkpoint, key, progress_key)
        version = checkpoint[key]["version"]
    return checkpoint


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
