"""Writing a model and its tokenizer as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging

from mmrec.export.hf.configuration import MmrecConfig
from mmrec.export.hf.modeling import MmrecForCausalLM
from mmrec.export.hf.tokenization import hf_tokenizer
from mmrec.model import RecurrentLM
from mmrec.tokenizers import Tokenizer


def save(folder: Path, net: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Write ``net`` and ``tokenizer`` as a folder that ``from_pretrained`` reads."""
    fast = hf_tokenizer(tokenizer)
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
