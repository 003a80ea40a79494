"""Writing a model and its tokenizer as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.weights import describe_exported
from mmrec.core.errors import UserError
from mmrec.export.hf.configuration import MmrecConfig
from mmrec.export.hf.modeling import MmrecForCausalLM
from mmrec.export.hf.tokenization import MmrecTokenizer
from mmrec.export.tokenizer import fast_tokenizer
from mmrec.model.config import BUILT_IN
from mmrec.tokenizers import Tokenizer

PAD = "<|pad|>"
"""A token that the model does not have, and that no text is cut into."""


def hf_tokenizer(tokenizer: Tokenizer) -> MmrecTokenizer:
    """Return the tokenizer of transformers that gives the ids of ``tokenizer``, and the text back."""
    return MmrecTokenizer(
        tokenizer_object=fast_tokenizer(tokenizer),
        pad_token=PAD,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save(folder: Path, trained: LoadedModel) -> None:
    """Write a model with its tokenizer and chat template as a folder that ``from_pretrained`` reads.

    Raises:
        UserError: the model has a recurrent layer whose code would not be in the folder.
    """
    net, tokenizer = trained.net, trained.tokenizer
    foreign = net.config.layer_other_than(BUILT_IN)
    if foreign is not None:
        raise UserError(f"--format hf: the model has {foreign} layers; only {', '.join(BUILT_IN)} are exported")
    fast = hf_tokenizer(tokenizer)
    fast.chat_template = None if trained.chat is None else trained.chat.jinja()
    with torch.device("meta"):
        model = MmrecForCausalLM(MmrecConfig(tokenizer.vocab_size, net.config.as_dict()))
    model.net = net
    # Not in the config: there it would have to be a token of the model.
    model.generation_config.pad_token_id = fast.pad_token_id
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one file is written, in a moment
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    fast.save_pretrained(folder)
    describe_exported(folder, net, tokenizer, trained.step, trained.chat)
