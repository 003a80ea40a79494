"""The stages of ``scripts/gpu_day.py``: what is measured on a GPU, at full size, or at a toy size to rehearse it."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from mmrec.baselines.learning import validation_loss
from mmrec.baselines.models import GPT, Wrapped
from mmrec.baselines.training import Hyperparameters, TrainingLoop, device_of, initial_state
from mmrec.bench.check import OpCase, op_cases, results_of
from mmrec.bench.measurements import peak_memory, repeat
from mmrec.checkpoints.loading import load_model
from mmrec.checkpoints.runs import checkpoint_folder
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import one_line
from mmrec.core.options import find_config
from mmrec.core.runtime import MIXED, native_precision
from mmrec.data.store import open_tokens
from mmrec.inference.reading import Reader
from mmrec.model import ModelConfig, RecurrentLM
from mmrec.model.captured import StaticStep
from mmrec.model.ops import dispatch

VOCABULARY = 50_304
"""Of speeds: GPT-2's number of tokens, rounded up."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Day:
    """What the stages are given.

    Args:
        device: that is measured, as find_device takes it.
        folder: for the results and the runs.
        data_dir: token folder of Tiny Shakespeare.
        toy: a rehearsal: sizes at which every stage ends in seconds on a CPU.
        seconds: of one measurement of speed, at least.
        deadline: of the monotonic clock; a stage begins no measurement after it.
    """

    device: str
    folder: Path
    data_dir: Path
    toy: bool = False
    seconds: float = 1.0
    deadline: float = float("inf")

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def sizes(self) -> dict[str, ModelConfig]:
        """Return the models by the name of their config."""
        if self.toy:
            return {"toy": ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24)}
        named = {
            name: yaml.safe_load(find_config(name).read_text(encoding="utf-8")) for name in ("mini", "small", "base")
        }
        return {name: ModelConfig(**read["model"]["config"]) for name, read in named.items()}

    @property
    def vocab_size(self) -> int:
        return 11 if self.toy else VOCABULARY


# (a) The ops


def ops(day: Day) -> Iterator[Row]:
    """Yield how far each op is from its reference in float64, and whether a second run gives the same bits."""
    precisions = {"float32": ("highest", False), "tf32": ("high", False), "bfloat16": ("highest", True)}
    before = torch.get_float32_matmul_precision()
    for op, case in op_cases(*((1, 37, 2, 8) if day.toy else (2, 1000, 4, 64))).items():
        expected = results_of(case.plain, [x.double() for x in case.inputs])
        for name, (products, mixed) in precisions.items():
            torch.set_float32_matmul_precision(products)
            try:
                yield {"op": op, "precision": name, **_compare(day, op, case, expected, mixed)}
            finally:
                torch.set_float32_matmul_precision(before)


def _compare(day: Day, op: str, case: OpCase, expected: list[Tensor], mixed: bool) -> Row:
    outputs = len(expected) - len(case.inputs)

    def chosen(*leaves: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(torch.device(day.device).type, torch.bfloat16, enabled=mixed):
            return case.chosen(*leaves)

    def run() -> list[Tensor]:
        """The backward pass is outside of autocast, as in training."""
        return results_of(chosen, [x.to(day.device) for x in case.inputs])

    found, again = run(), run()
    errors = [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    kernels = dispatch.delta_rule_kernels if op == "gated_delta_rule" else dispatch.own_kernels
    return {
        **{"outputs": max(errors[:outputs]), "gradients": max(errors[outputs:])},
        "same_bits": all(torch.equal(a, b) for a, b in zip(found, again, strict=True)),
        "kernels": day.device != "cpu" and kernels(torch.device(day.device)) is not None,
    }


# (b) Resuming


def resume(day: Day) -> Iterator[Row]:
    """Yield whether a training that was resumed ends with the bits of one that was not, and its loss on a CPU."""
    steps = 4 if day.toy else 20
    common = [*_training(day), "--trainer.max_epochs=-1", "--model.min_lr_ratio=1"]
    _quiet("fit", [*common, f"--trainer.max_steps={2 * steps}", "--run=whole"])
    _quiet("fit", [*common, f"--trainer.max_steps={steps}", "--run=parts"])
    more = [f"--trainer.default_root_dir={day.folder}", f"--trainer.max_steps={2 * steps}"]
    _quiet("fit", ["--run=parts", "--ckpt_path=last", *more])
    nets = [load_model(checkpoint_folder(day.folder, run) / "last.ckpt").net for run in ("whole", "parts")]
    weights = [net.state_dict() for net in nets]
    same = all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    data = open_tokens(day.data_dir)
    with torch.inference_mode():
        tokens = torch.from_numpy(np.asarray(data.val[:257]).astype(np.int64))[None]
        nets[1].to(day.device)
        logits = [net(tokens[:, :-1].to(device_of(net)), net.zero_state(1))[0] for net in nets]
    on_cpu, here = (float(nn.functional.cross_entropy(x[0].float().cpu(), tokens[0, 1:])) for x in logits)
    yield {"updates": 2 * steps, "resumed_after": steps, "same_bits": same, "loss_on_cpu": on_cpu, "loss_here": here}


def _training(day: Day) -> list[str]:
    """Return the options of a training on the device."""
    kind, _, number = day.device.partition(":")
    accelerator = {"cuda": "gpu"}.get(kind, kind)
    options = [
        f"--trainer.default_root_dir={day.folder}",
        f"--data.data_dir={day.data_dir}",
        "--trainer.enable_progress_bar=false",
    ]
    options += [f"--trainer.accelerator={accelerator}", f"--trainer.devices={f'[{number}]' if number else 1}"]
    if not day.toy:
        return ["--config=mini", *options]
    config = "--model.config={dim: 16, layers: 2, heads: 2, ffn_dim: 24}"
    return [config, "--data.batch_size=2", "--data.seq_len=64", "--model.warmup_steps=2", *options]


def _quiet(command: str, arguments: list[str]) -> None:
    """Run a command of Lightning, without what it prints; the other stages do without importing it."""
    from mmrec.training.cli import run_lightning

    with contextlib.redirect_stdout(io.StringIO()):
        run_lightning(command, arguments)


# (c) Speed of training


def speed(day: Day) -> Iterator[Row]:
    """Yield tokens a second and the most memory of training, by length, size and model; short and small first."""
    lengths = (16, 32) if day.toy else (512, 4096, 16_384, 131_072)
    for length in lengths:
        for size, config in day.sizes().items():
            for name in MODELS:
                about = {"model": name, "size": size, "length": length}
                yield about | ({"left_out": "no time"} if day.is_over() else _train(day, name, config, length))


def _train(day: Day, name: str, config: ModelConfig, length: int) -> Row:
    model: nn.Module | None = None
    try:
        model = MODELS[name](config, day.vocab_size, length)
        if model is None:
            return {"left_out": "its package is not here"}
        loop = TrainingLoop(
            model.to(day.device),
            Hyperparameters(learning_rate=1e-3),
            None,
            native_precision(day.device.split(":")[0]),
        )
        rows = max(1, (64 if day.toy else 16_384) // length)
        if day.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(day.device)

        def update() -> None:
            tokens = torch.randint(day.vocab_size, (rows, length + 1), device=day.device)
            loss, _ = loop.loss(tokens[:, :-1], tokens[:, 1:], initial_state(loop.model, rows))
            loop.update(loss)

        for _ in range(2):  # kernels are compiled, memory is taken
            update()
        times = repeat(update, day.seconds, day.device)
    except Exception as error:  # no memory, or another package's fault: a result, too
        return {"failed": f"{type(error).__name__}: {one_line(error)[:200]}"}
    parameters = sum(p.numel() for p in model.parameters())
    found = {"tokens_per_second": rows * length * len(times) / sum(times), "rows": rows, "updates": len(times)}
    return found | {"peak_bytes": peak_memory(day.device), "parameters": parameters}


def _gpt(config: ModelConfig, vocab_size: int, length: int) -> nn.Module:
    return GPT(vocab_size, length, config.dim, config.layers, config.heads)


def _fla_model(config: ModelConfig, vocab_size: int, length: int) -> nn.Module | None:
    """Return flash-linear-attention's own model, of as many layers and parameters; None where it is not installed."""
    if find_spec("fla") is None or find_spec("fla.models") is None:
        return None
    models: Any = import_module("fla.models")
    sizes = {"hidden_size": config.dim, "num_hidden_layers": config.layers, "num_heads": config.heads}
    inner = {"head_dim": config.dim // config.heads, "expand_v": 1, "intermediate_size": config.ffn_dim}
    made = models.GatedDeltaNetConfig(
        **sizes, **inner, vocab_size=vocab_size, tie_word_embeddings=True, use_cache=False
    )
    model = Wrapped(models.GatedDeltaNetForCausalLM(made))
    # As ours: the time of the stage would go into trials of the forms of its kernels.
    import_module("mmrec.model.ops.fla_delta_rule").pin_choices()
    return model


MODELS: dict[str, Callable[[ModelConfig, int, int], nn.Module | None]] = {
    "mmrec": lambda config, vocab_size, length: RecurrentLM(config, vocab_size),
    "gpt": _gpt,
    "fla": _fla_model,
}


# (d) Speed of generating


@torch.inference_mode()
def decode(day: Day) -> Iterator[Row]:
    """Yield tokens a second of all rows together, by rows, how much was read before, and how a step is made.

    A step is captured as a CUDA graph, or made operation by operation; on a CPU the latter alone.
    """
    positions, many = ((8, 24), 4) if day.toy else ((100, 10_000), 256)
    for size, config in [*day.sizes().items()][:2]:
        net = RecurrentLM(config, day.vocab_size).to(day.device).eval()
        for rows in (1, many):
            for position in positions:
                about = {"size": size, "rows": rows, "position": position}
                if day.is_over():
                    yield about | {"left_out": "no time"}
                else:
                    yield from (about | found for found in _decode(day, net, rows, position))


def _decode(day: Day, net: RecurrentLM, rows: int, position: int) -> Iterator[Row]:
    state, part = net.zero_state(rows), max(1, 65_536 // rows)
    for begin in range(0, position, part):
        tokens = torch.randint(day.vocab_size, (rows, min(part, position - begin)), device=day.device)
        _, state = net.hidden(tokens, state)
    step, count = StaticStep(net, rows), 2 if day.toy else 32
    for make_step in [step.run, step.compute] if step.is_captured else [step.compute]:
        step.set_state(state)

        def generate(make_step: Callable[[], None] = make_step) -> None:
            for _ in range(count):
                make_step()
                step.tokens.copy_(step.logits.argmax(-1, keepdim=True))

        generate()
        times = repeat(generate, day.seconds, day.device)
        speed = rows * count * len(times) / sum(times)
        yield {"captured": make_step == step.run, "tokens_per_second": speed}


# (e) and (f) Learning


def learn(day: Day) -> Iterator[Row]:
    """Yield the carried loss of 10.65 million parameters after nanoGPT's 5,000 updates of 16,384 tokens, or less."""
    minutes = max(0.02, (day.deadline - time.monotonic()) / 60 - 0.4) if day.deadline < float("inf") else 60
    steps = 6 if day.toy else 5000 * 16_384 // (16 * 512)
    length = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", f"--time_limit.minutes={minutes:.2f}"]
    started = time.monotonic()
    _quiet("fit", [*_training(day), *length, "--run=learn"])
    seconds = time.monotonic() - started
    trained = load_model(checkpoint_folder(day.folder, "learn") / "last.ckpt")
    loss = validation_loss(trained.net.to(day.device), open_tokens(day.data_dir), 256)
    yield {"updates": trained.step, "of": steps, "seconds": seconds, "carried_loss": loss, "precision": MIXED}


def read(day: Day) -> Iterator[Row]:
    """Yield the loss of held-out text and tokens a second, by the model of :func:`learn`, as trained and learning."""
    path = checkpoint_folder(day.folder, "learn") / "last.ckpt"
    if not path.exists():
        yield {"left_out": "no model of the stage learn"}
        return
    net = load_model(path).net.to(day.device)
    text = np.asarray(open_tokens(day.data_dir).val[: 300 if day.toy else 20_000])
    for learning in (False, True):
        memory = SavedState.empty(net)
        reader = Reader(net, memory.learning(net) if learning else memory)
        started, parts = time.monotonic(), []
        for part in reader.read(text):
            parts.append(part.nll)
            if day.is_over():
                break
        seconds, nll = time.monotonic() - started, torch.cat(parts)
        yield {"learns": learning, "loss": float(nll[1:].mean()), "tokens_per_second": len(nll) / seconds}


STAGES: dict[str, tuple[Callable[[Day], Iterator[Row]], float]] = {
    "ops": (ops, 60),
    "resume": (resume, 80),
    "speed": (speed, 200),
    "decode": (decode, 70),
    "learn": (learn, 130),
    "read": (read, 40),
}
"""Each stage, and the seconds that it may take: less than ten minutes in all."""


def names(chosen: Sequence[str]) -> list[str]:
    """Return the names of the stages in ``chosen``, all where it is empty, in their order."""
    return [name for name in STAGES if not chosen or name in chosen]
