"""Counts kernels and waits of an update on the simulated CUDA device of the tests: the table of docs/gpu.md.

    python scripts/count_kernels.py [CONFIG ...]
    python scripts/count_kernels.py --layers

The number of kernels depends on layers, lengths and shapes, not on widths: the models are as deep as the config says,
and narrow. With ``--layers`` it is that of a single layer and of its block, by torch and by the kernels of the extra
gpu, whose launches are counted and compute nothing; and the bytes that both keep for the backward pass.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from phantom import cuda  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmrec.inference.metrics import token_nll  # noqa: E402
from mmrec.model import Block, ModelConfig, RecurrentLM  # noqa: E402
from mmrec.model.ops import dispatch  # noqa: E402
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
            loss = token_nll(net.logits(hidden), tokens, "mean")
        with cuda.counted() as backward:
            loss.backward()
        with cuda.counted() as step:
            optimizer.step()
            optimizer.zero_grad()
        parts = {"forward": forward, "backward": backward, "optimizer": step}
        assert not any(part.waits for part in parts.values())
        found = {name: sum(part.kernels.values()) for name, part in parts.items()}
    return found


def launches_compute_nothing() -> None:
    """Let dispatch take kernels, and count their launches instead of making them: there is no driver."""
    from kernels.compile import pretend
    from triton.runtime import jit

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        cuda._listen(cuda.KERNEL, self.__name__)

    functions = {name: getattr(torch.cuda, name) for name in vars(torch.cuda)}
    pretend(90)
    for name, function in functions.items():  # the simulated device's own, of which it knows more
        setattr(torch.cuda, name, function)
    jit.JITFunction.run = launch
    torch.version.cuda = "13.0"
    dispatch.own_kernels.cache_clear()
    dispatch.delta_rule_kernels.cache_clear()


def count_layer(kind: str, length: int, documents: bool, whole_block: bool) -> tuple[int, int, float]:
    """Return the kernels of forward and backward, and the bytes a token and channel that are kept; in bfloat16."""
    rows, dim = 3, 256
    block = Block(ModelConfig(dim=dim, heads=4, ffn_dim=704, layers=1, layer_types=(kind,)), kind, 0.0).cuda()
    part: Any = block if whole_block else block.memory
    x = torch.zeros(rows, length, dim, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        normal = block.memory_norm(x).detach().requires_grad_()  # as a layer reads it
    given = x if whole_block else normal
    mask = torch.zeros(rows, length, dtype=torch.bool, device="cuda") if documents else None
    state = block.memory.zero_state(rows, x.device, torch.float32)
    kept = Kept(block)
    for _ in range(2):  # the first time compiles
        block.zero_grad()
        given.grad = None
        kept.storages.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda x: x)
        with cuda.counted() as forward, torch.autocast("cuda", torch.bfloat16), hooks:
            y, _ = part(given, state, mask)
        with cuda.counted() as backward:
            y.backward(torch.ones_like(y))
    launches = [sum(counts.kernels.values()) for counts in (forward, backward)]
    return launches[0], launches[1] - 1, kept.bytes() / (rows * length * dim)  # without the ones


class Kept:
    """What is kept for the backward pass: storages, each once, without weights, whatever their dtype."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {tuple(sorted(weight.shape)) for weight in module.parameters()}
        self.storages: dict[int, Any] = {}

    def keep(self, x: Tensor) -> Tensor:
        if tuple(sorted(x.shape)) not in self.weights:
            storage = x.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return x

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def print_layers() -> None:
    """Print launches and bytes of each layer and block, by torch and by kernels."""
    warnings.filterwarnings("ignore")
    cases = [
        (kind, length, documents, whole)
        for whole in (False, True)
        for kind in ("short", "long")
        for length, documents in ((512, False), (512, True), (4096, False))
    ]
    by_torch = [count_layer(*case) for case in cases]
    launches_compute_nothing()
    by_kernels = [count_layer(*case) for case in cases]
    print("| | tokens a row | documents | torch: forward, backward | bytes | kernels: forward, backward | bytes |")
    print("|---|---|---|---|---|---|---|")
    for (kind, length, documents, whole), one, other in zip(cases, by_torch, by_kernels, strict=True):
        name, marked = f"{kind}{', block' if whole else ''}", "yes" if documents else "no"
        figures = [f"{forward}, {backward} | {kept:.1f}" for forward, backward, kept in (one, other)]
        print(f"| {name} | {length:,} | {marked} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--layers", action="store_true", help="a single layer and its block, of each kind")
    options = parser.parse_args()
    cuda.install()
    if options.layers:
        print_layers()
        return
    chosen = options.configs
    counted = []
    for _ in range(2):
        for name in chosen:
            given = yaml.safe_load((REPOSITORY / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
            model, length = given["model"], given["data"]["seq_len"]
            config = ModelConfig(**(model["config"] | NARROW))
            counted.append((config.layers, length, count(config, length, model.get("dropout", 0.0))))
        launches_compute_nothing()
    print("| config | layers | tokens of a row | by torch: in all | by kernels | forward | backward | optimizer |")
    print("|---|---|---|---|---|---|---|---|")
    for index, name in enumerate(chosen):
        layers, length, by_torch = counted[index]
        by_kernels = counted[len(chosen) + index][2]
        figures = [layers, length, sum(by_torch.values()), sum(by_kernels.values()), *by_kernels.values()]
        print(f"| `{name}` | " + " | ".join(f"{figure:,}" for figure in figures) + " |", flush=True)


if __name__ == "__main__":
    main()
