"""Train a recurrent-memory language model on your own text, on a laptop or on a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrec.inference.api import MemoryLM

__version__ = "0.2.0"
__all__ = ["MemoryLM"]


def __getattr__(name: str) -> Any:
    """Import the API when it is asked for: the commands start faster without torch."""
    if name == "MemoryLM":
        from mmrec.inference.api import MemoryLM

        return MemoryLM
    raise AttributeError(f"module 'mmrec' has no attribute {name!r}")
