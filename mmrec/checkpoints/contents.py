"""What a checkpoint holds: the keys of its dictionary, and the description of the model that it belongs to.

Lightning's keys:

- ``state_dict``: the weights, those of the model as ``net.NAME`` and those of the MTP head as ``mtp_head.NAME``;
  ``current_model_state`` has those that are trained where ``state_dict`` has their EMA
- ``optimizer_states``, ``lr_schedulers``: the optimizer and the learning-rate schedule
- ``callbacks``: the state of each callback, by its class and arguments
- ``loops``: the counters of epochs, batches and updates; in the fit loop, the state of the data loaders: the position
  in the text
- ``epoch``, ``global_step``, ``pytorch-lightning_version``, ``hyper_parameters``

Of this program:

- :data:`MODEL_KEY`: format version, config of the model, tokenizer, and the chat template where the model has one
- :data:`PROGRESS_KEY`: the hyper-parameters, the carried state of every row, the states of the random generators of
  every process, the number of threads that torch computed with, and whether by the compiled kernels for a CPU
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mmrec.checkpoints.chat_template import ChatTemplate
from mmrec.checkpoints.migrations import VERSION
from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM
from mmrec.tokenizers import Tokenizer, load_tokenizer

MODEL_KEY = "mmrec"
"""Key of the description of the model: plain values, so that ``weights_only`` loads them."""
PROGRESS_KEY = "mmrec_progress"
"""Key of what only resuming a training needs; absent from a checkpoint of weights alone."""


def describe_model(net: RecurrentLM, tokenizer: Tokenizer, chat: ChatTemplate | None = None) -> dict[str, Any]:
    """Return the description of a model that a checkpoint has under :data:`MODEL_KEY`."""
    described = {"version": VERSION, "shape": net.config.as_dict(), "tokenizer": tokenizer.state()}
    return described | ({} if chat is None else {"chat": asdict(chat)})


def described_chat(description: dict[str, Any]) -> ChatTemplate | None:
    """Return the chat template of a model, or None where its description has none, as that of older checkpoints.

    Raises:
        TypeError: it is no template.
        UserError: it is one that cannot be used.
    """
    chat = description.get("chat")
    return None if chat is None else ChatTemplate(**chat)


def check_compatible(checkpoint: dict[str, Any], net: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Raise UserError where the checkpoint is of another architecture or tokenizer, saying what differs."""
    if MODEL_KEY not in checkpoint:
        raise UserError("the checkpoint is not one of mmrec")
    saved, here = checkpoint[MODEL_KEY]["shape"], net.config.as_dict()
    sides = {name: (saved.get(name, False), here.get(name, False)) for name in here | saved}
    differ = [f"{name} {there} there, {ours} here" for name, (there, ours) in sides.items() if there != ours]
    if differ:
        raise UserError(f"the checkpoint is of another architecture: {'; '.join(differ)}")
    if checkpoint[MODEL_KEY]["tokenizer"] != tokenizer.state():
        other = load_tokenizer(checkpoint[MODEL_KEY]["tokenizer"])
        raise UserError(
            f"the checkpoint was trained with another tokenizer ({other.name}, {other.vocab_size} tokens) than "
            f"the data was prepared with ({tokenizer.name}, {tokenizer.vocab_size} tokens)"
        )


def model_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the weights of the model by the names that it has for them, without what only training needs."""
    weights = checkpoint["state_dict"]
    return {name.removeprefix("net."): weights[name] for name in weights if name.startswith("net.")}
