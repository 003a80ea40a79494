"""The config of an exported model, as a config of transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mmrec.model import ModelConfig

MODULE = "modeling_mmrec"
"""The file in an exported folder from which the library imports the classes."""


class MmrecConfig(PreTrainedConfig):
    """The architecture of a :class:`mmrec.model.RecurrentLM`.

    Args:
        vocab_size: number of different tokens, N.
        architecture: what :meth:`mmrec.model.ModelConfig.as_dict` returns; the defaults of its fields if left out.
        kwargs: of every config of the library.
    """

    model_type = "mmrec"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 -- the library's own form

    def __init__(self, vocab_size: int = 256, architecture: dict[str, Any] | None = None, **kwargs: Any) -> None:
        first_name = kwargs.pop("shape", None)  # of the argument, in folders that the first version exported
        known = ModelConfig.from_dict(architecture or first_name or {})
        self.vocab_size, self.architecture = vocab_size, known.as_dict()
        self.use_cache = kwargs.pop("use_cache", True)
        own = {
            "tie_word_embeddings": known.tie_embeddings,
            "auto_map": {
                "AutoConfig": f"{MODULE}.MmrecConfig",
                "AutoModelForCausalLM": f"{MODULE}.MmrecForCausalLM",
            },
        }
        super().__init__(**kwargs | own)

    @property
    def hidden_size(self) -> int:
        """D, by the name that the library knows it by."""
        return int(self.architecture["dim"])

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks, by the name that the library knows it by."""
        return int(self.architecture["layers"])

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Leave the ``auto_map`` as it is: the library would have this file copied into each saved folder."""
