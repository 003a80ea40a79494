"""The figures of a validation as a metric of torchmetrics, as Lightning's modules have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from mmrec.core.devices import has_float64
from mmrec.inference.metrics import TextMetrics


class TextScore(TextMetrics, Metric):
    """:class:`mmrec.inference.metrics.TextMetrics`, whose sums are the states of a metric.

    Programs that train nothing do without torchmetrics. Every process has the figures of the whole text, so
    nothing is added up over them.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        Metric.__init__(self, sync_on_compute=False)
        for name in ("nll", "tokens", "bytes", "characters"):
            self.add_state(name, torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> TextScore:
        """Move to where ``fn`` moves tensors, but for a device that cannot hold such numbers."""
        if has_float64(fn(torch.zeros(0)).device):
            super()._apply(fn, exclude_state)
        return self
