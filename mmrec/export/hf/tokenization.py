"""The tokenizer of an exported model, as a tokenizer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast

from mmrec.export.hf.configuration import MODULE


class MmrecTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of the library that names the character for which there is no token.

    Without ``trust_remote_code`` the library's own class loads from the same folder; its error does not name it.
    """

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Save as the library does, with its own class as the one for those who do not trust the folder's code."""
        files: tuple[str, ...] = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = PreTrainedTokenizerFast.__name__
        config["auto_map"] = {"AutoTokenizer": [None, f"{MODULE}.{MmrecTokenizer.__name__}"]}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return files

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """As for the config."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        try:
            return super()._encode_plus(text, *args, **kwargs)
        except Exception as error:
            known = self.get_vocab()
            missing = next((c for part in _strings(text) for c in part if c not in known), None)
            if "[UNK]" not in str(error) or missing is None:
                raise
            raise ValueError(f"the character {missing!r} is not in the model's alphabet") from None


def _strings(text: Any) -> list[str]:
    """Return the strings in a text, or in lists of texts of any depth."""
    return [text] if isinstance(text, str) else [part for one in text for part in _strings(one)]
