"""The metric of a validation: the figures of a score, in whatever parts they come; and none of it is saved."""

from __future__ import annotations

import torch

from mmrec.inference.metrics import TextMetrics
from mmrec.training.metrics import TextScore


def test_it_gives_the_figures_of_a_score_in_any_parts() -> None:
    nll, lengths = torch.rand(100), torch.randint(1, 5, (100, 2))
    score, reference = TextScore(), TextMetrics()
    for part in torch.arange(100).split(7):
        score.update(nll[part], lengths[part])
    reference.update(nll, lengths)
    for name, value in reference.compute().items():
        torch.testing.assert_close(score.compute()[name], value)
    score.reset()
    assert score.tokens == 0
    assert not score.state_dict()
