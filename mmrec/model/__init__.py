"""The recurrent language model: its config, its layers, and the whole of them.

Data flows one way: ``ops`` (the recurrences), ``state``, ``recurrent_layer`` (the interface), ``layers`` (those that
are not recurrent), one file a recurrent layer, ``config`` (with :data:`LAYER_TYPES`, the registry of recurrent
layers), ``token_counts`` (a state of the output layer), ``lm``; then what runs a model: ``decode`` (one token at a
time) and ``statistics``.
docs/model.md has the equations.

Letters of dimensions, in this folder and in ``ops``:

========  ==================================================================
``B``     rows of a batch: texts that are read in parallel
``T``     tokens
``D``     width of the model, and of the RG-LRU: ``config.dim``
``H``     heads of a Gated DeltaNet: ``config.heads``
``K, V``  size of a head's keys and of its values; both are D / H here
``F``     inner width of the feed-forward network: ``config.ffn_dim``
``C``     tokens that the causal convolution sees: ``config.conv_width``
``N``     size of the vocabulary
``R``     half-lives of the counts of tokens: ``config.count_half_lives``
========  ==================================================================
"""

from mmrec.model.config import LAYER_TYPES, ModelConfig, layer_parameters
from mmrec.model.gated_deltanet import GatedDeltaNet
from mmrec.model.layers import CausalConv, FeedForward, RMSNorm
from mmrec.model.lm import INITIAL_SCALE, Block, Hidden, RecurrentLM
from mmrec.model.ops.reference import apply_reset
from mmrec.model.portable import PortableGatedDeltaNet
from mmrec.model.recurrent_layer import Gates, RecurrentLayer
from mmrec.model.rg_lru import RGLRU
from mmrec.model.state import LayerState, State, detach_state, reset_state_rows, state_to
from mmrec.model.token_counts import TokenCounts

__all__ = [
    "INITIAL_SCALE",
    "LAYER_TYPES",
    "RGLRU",
    "Block",
    "CausalConv",
    "FeedForward",
    "GatedDeltaNet",
    "Gates",
    "Hidden",
    "LayerState",
    "ModelConfig",
    "PortableGatedDeltaNet",
    "RMSNorm",
    "RecurrentLM",
    "RecurrentLayer",
    "State",
    "TokenCounts",
    "apply_reset",
    "detach_state",
    "layer_parameters",
    "reset_state_rows",
    "state_to",
]
