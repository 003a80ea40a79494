"""The figures of a validation as a metric of torchmetrics, as Lightning's modules have them."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from mmrec.inference.metrics import TextMetrics


class TextScore(TextMetrics, Metric):
    """:class:`mmrec.inference.metrics.TextMetrics`, whose sums are the states of a metric.

    Programs that train nothing do without torchmetrics. Every process reads the whole text, so nothing is added up
    over them.
    """

    full_state_update = False
    higher_is_better = False

    def __init__(self) -> None:
        Metric.__init__(self, sync_on_compute=False)
        for name in ("nll", "tokens", "bytes", "characters"):
            self.add_state(name, torch.zeros((), dtype=torch.float64))
