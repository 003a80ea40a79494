"""Counts kernels and waits of an update on the simulated CUDA device of the tests: the table of docs/gpu.md.

    python scripts/count_kernels.py [CONFIG ...]

The number of kernels depends on layers, lengths and shapes, not on widths: the models are as deep as the config says,
and narrow.
"""

from __future__ import annotations

import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from phantom import cuda  # noqa: E402

from mmrec.inference.metrics import token_nll  # noqa: E402
from mmrec.model import ModelConfig, RecurrentLM  # noqa: E402
from mmrec.training.optim import make_optimizer  # noqa: E402
from mmrec.training.options import OptimizerOptions  # noqa: E402

CONFIGS = ["quickstart", "mini", "small", "base"]
NARROW = {"dim": 32, "heads": 4, "ffn_dim": 48}


def count(config: ModelConfig, length: int, dropout: float) -> dict[str, int]:
    """Return the kernels of each part of an update, in bfloat16 as training does it."""
    net = RecurrentLM(config, 11, dropout).cuda()
    optimizer = make_optimizer(net, OptimizerOptions())
    tokens = torch.zeros(1, length, dtype=torch.int64, device="cuda")
    found: dict[str, int] = {}
    for _ in range(2):  # the first update of an optimizer makes its state
        with cuda.counted() as forward, torch.autocast("cuda", torch.bfloat16):
            hidden, _ = net.hidden(tokens, net.zero_state(1))
            loss = token_nll(net.head(hidden), tokens, "mean")
        with cuda.counted() as backward:
            loss.backward()
        with cuda.counted() as step:
            optimizer.step()
            optimizer.zero_grad()
        parts = {"forward": forward, "backward": backward, "optimizer": step}
        assert not any(part.waits for part in parts.values())
        found = {name: sum(part.kernels.values()) for name, part in parts.items()}
    return found


def main() -> None:
    cuda.install()
    print(
        "| config | layers | tokens of a row | forward | backward | optimizer | in all |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in sys.argv[1:] or CONFIGS:
        options = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
        model, length = options["model"], options["data"]["seq_len"]
        config = ModelConfig(**(model["config"] | NARROW))
        found = count(config, length, model.get("dropout", 0.0))
        figures = [config.layers, length, *found.values(), sum(found.values())]
        print(f"| `{name}` | " + " | ".join(f"{figure:,}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
