"""What the server of ``processes`` imports before it forks: all that a training does, and what tests share."""

from __future__ import annotations

import gc

import conftest  # noqa: F401 -- imports Lightning as mmrec does, when it is first
import torch.utils.tensorboard  # noqa: F401

import mmrec.training.cli  # noqa: F401

gc.freeze()  # collections in the forked processes leave these objects, and so their pages, alone
