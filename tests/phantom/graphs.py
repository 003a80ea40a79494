"""A stand-in for CUDA graphs: what was done during a capture is done again, in the same memory, as one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phantom import cuda

_capturing: list[Graph] = []


def is_capturing() -> bool:
    """Return whether a graph is being captured."""
    return bool(_capturing)


class Graph:
    """torch.cuda.CUDAGraph: the operations of a capture, each with its arguments and its results."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        """Do all once more; results of their own go into the memory in which they lay at the capture."""
        with torch.inference_mode(), cuda.uncounted("graph"):
            for operation, args, kwargs, before in self.operations:
                after = operation(*args, **kwargs)
                given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor) and _memory(old) not in given:
                        old.copy_(new)


class Capture(TorchDispatchMode):
    """torch.cuda.graph: a device refuses whatever the host would have to wait for meanwhile."""

    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = cuda_graph
        self.counting = cuda.counted()

    def __enter__(self) -> Capture:
        self.counts = self.counting.__enter__()
        _capturing.append(self.graph)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _capturing.pop()
        self.counting.__exit__(*error)
        if self.counts.waits and error[0] is None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {dict(self.counts.waits)}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.graph.operations.append((func, args, kwargs, found))
        return found


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
