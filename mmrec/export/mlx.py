"""A model as a folder for MLX: weights, config, tokenizer, and the code that runs them there."""

from __future__ import annotations

import json
from pathlib import Path

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.weights import save_weights
from mmrec.core.errors import UserError
from mmrec.export.tokenizer import fast_tokenizer

CODE = "mlx_model.py"
"""The file beside this one that stands in each exported folder; it needs neither mmrec nor torch."""
LAYER_TYPES = ("short", "long", "portable")
"""The recurrent layers that it has."""


def save(folder: Path, trained: LoadedModel) -> None:
    """Write ``model.safetensors``, ``config.json``, ``tokenizer.json`` and the code; MLX itself is not needed.

    Raises:
        UserError: the model has a recurrent layer that the code has no form of.
    """
    config = trained.net.config
    other = config.layer_other_than(LAYER_TYPES)
    if other is not None:
        known = ", ".join(LAYER_TYPES)
        raise UserError(f"--format mlx: the model has {other} layers; there is code for MLX of {known} alone")
    fast_tokenizer(trained.tokenizer).save(str(folder / "tokenizer.json"))
    described = {
        "model_type": "mmrec",
        "model_file": CODE,  # the name by which mlx-lm asks for it
        "vocab_size": trained.tokenizer.vocab_size,
        "architecture": config.as_dict(),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    save_weights(folder / "model.safetensors", trained.net, trained.tokenizer, trained.step, trained.chat)
    (folder / CODE).write_text(Path(__file__).with_name(CODE).read_text(encoding="utf-8"), encoding="utf-8")
