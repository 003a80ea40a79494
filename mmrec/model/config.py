"""The config of a model, and the registry of recurrent layers that its ``layer_types`` name."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmrec.core.errors import UserError, nearest
from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.recurrent_layer import RecurrentLayer
from mmrec.model.rg_lru import RGLRU


@dataclass(frozen=True)
class ModelConfig:
    """What fixes the architecture: two models of equal config and vocabulary can exchange weights.

    Args:
        dim: width of the model, D.
        layers: number of layers.
        layer_types: the recurrent layer of each block, "short" (RG-LRU), "long" (gated delta rule) or "portable" (the
            long one in the form that can be exported as GGUF), repeated until there are ``layers``.
        heads: heads of a long or portable layer, H; each holds a matrix of (dim / heads) squared numbers.
        ffn_dim: inner width of the feed-forward network, F.
        conv_width: tokens that the causal convolution sees, C; 1 leaves it without a past.
        tie_embeddings: read the input embedding also as the output layer.
        negative_eigenvalues: let a long layer turn what it holds for a key into its opposite, not only forget it:
            tracking a state, such as parity, needs that (Grazzi et al. 2024).
        count_half_lives: half-lives, in tokens, of decayed counts of the tokens that were read, which make likelier
            what a text uses (a cache language model, Kuhn and De Mori 1990); without counts where it is empty. For
            words as tokens: counts of characters or bytes say little.
    """

    dim: int = 128
    layers: int = 4
    layer_types: Sequence[str] = ("short", "long")
    heads: int = 4
    ffn_dim: int = 256
    conv_width: int = 4
    tie_embeddings: bool = True
    negative_eigenvalues: bool = False
    count_half_lives: Sequence[float] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"model.config.{field.name} is {value}; it must be a whole number, at least 1")
        for half_life in self.count_half_lives:
            if isinstance(half_life, bool) or not isinstance(half_life, int | float) or not 1 <= half_life < math.inf:
                raise UserError(f"model.config.count_half_lives has {half_life}; they are tokens, at least 1")
        if self.dim % self.heads:
            raise UserError(f"model.config.dim {self.dim} is not a multiple of model.config.heads {self.heads}")
        if not self.layer_types:
            raise UserError(f"model.config.layer_types is empty; name at least one of {', '.join(LAYER_TYPES)}")
        other = self.layer_other_than(LAYER_TYPES)
        if other is not None:
            hint = nearest(other, LAYER_TYPES)
            raise UserError(
                f"model.config.layer_types: unknown kind {other!r}; known: {', '.join(LAYER_TYPES)}{hint}"
            )

    def layer_other_than(self, known: Collection[str]) -> str | None:
        """Return the first of the recurrent layers that is not ``known``; None where all are."""
        return next((kind for kind in self.layer_types if kind not in known), None)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, under the names that files of models know them by.

        These names are those of the first version of the format: checkpoints, memory files and hashes of models
        keep them, so that old files and new ones can be told to be of the same model.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.negative_eigenvalues:  # as before there was this field: the hash of such a model stays
            del values["negative_eigenvalues"]
        values["count_half_lives"] = list(values["count_half_lives"])
        if not self.count_half_lives:  # likewise
            del values["count_half_lives"]
        values["memories"] = list(values.pop("layer_types"))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Return the config that :meth:`as_dict` described; TypeError where ``values`` has a field of no config."""
        named = {"layer_types" if name == "memories" else name: value for name, value in values.items()}
        return cls(**named)


def layer_parameters(config: ModelConfig) -> int:
    """Return about how many parameters the layers have: all but the embedding and the output layer."""
    return config.layers * (5 * config.dim**2 + 3 * config.dim * config.ffn_dim)


LAYER_TYPES: dict[str, Callable[[ModelConfig], RecurrentLayer]] = {
    "short": lambda c: RGLRU(c.dim, c.conv_width),
    "long": lambda c: GatedDeltaNet(c.dim, c.heads, c.conv_width, c.negative_eigenvalues),
    "portable": lambda c: PortableGatedDeltaNet(c.dim, c.heads, c.conv_width, c.negative_eigenvalues),
}
"""The recurrent layers by the names that ``layer_types`` knows: how each is made from a config."""
BUILT_IN = tuple(LAYER_TYPES)
"""Those of this package; other programs register more."""
