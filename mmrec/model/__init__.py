"""The recurrent language model: its config, its layers, and the whole of them."""

from mmrec.model.lm import (
    INITIAL_SCALE,
    LAYER_TYPES,
    RGLRU,
    GatedDeltaNet,
    LayerState,
    ModelConfig,
    RecurrentLayer,
    RecurrentLM,
    RMSNorm,
    State,
    detach_state,
    reset_state_rows,
)

__all__ = [
    "INITIAL_SCALE",
    "LAYER_TYPES",
    "RGLRU",
    "GatedDeltaNet",
    "LayerState",
    "ModelConfig",
    "RMSNorm",
    "RecurrentLM",
    "RecurrentLayer",
    "State",
    "detach_state",
    "reset_state_rows",
]
