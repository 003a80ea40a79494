"""A GPT to compare with, trained on the same text; it learns from what it reads by the rule of a learned memory."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmrec.baselines.learning import RandomWindows, train_step
from mmrec.baselines.models import GPT
from mmrec.baselines.training import HYPERPARAMETERS, Hyperparameters, TrainingLoop, device_of
from mmrec.checkpoints.learned import INITIAL_MIX, LearnedWeights, squares_shapes
from mmrec.core.runtime import native_precision
from mmrec.data.store import TokenFolder
from mmrec.inference.learning import mix_part, updated_weights
from mmrec.inference.metrics import token_nll

CPU_DEVICE = torch.device("cpu")


def train_gpt(
    data: TokenFolder, chosen: Hyperparameters, tokens: int, seed: int, device: torch.device = CPU_DEVICE
) -> GPT:
    """Return a GPT of 0.8 M parameters, trained on windows at random places of a training text.

    Args:
        data: its training text is read.
        chosen: hyper-parameters; a window has ``seq_len`` tokens, and the GPT positions for no more.
        tokens: to train on in all.
        seed: of the weights, and of the places of windows.
        device: of the weights.
    """
    torch.manual_seed(seed)
    model, steps = GPT(data.tokenizer.vocab_size, chosen.seq_len).to(device), chosen.steps(tokens)
    loop = TrainingLoop(model, chosen, steps, native_precision(device.type))
    batches = RandomWindows(model, data.train, chosen, seed)
    for _ in tqdm(range(steps), desc="training the GPT", disable=not sys.stderr.isatty()):
        train_step(loop, batches)
    return model.eval()


def gpt_hyperparameters(window: int, batch_tokens: int, learning_rate: float) -> Hyperparameters:
    """Return nanoGPT's CPU recipe with other windows, updates of about so many tokens, and another rate."""
    rows = max(1, batch_tokens // window)
    return replace(HYPERPARAMETERS["gpt"], batch_size=rows, seq_len=window, learning_rate=learning_rate)


def learned_nll(gpt: GPT, text: np.ndarray, part: int) -> Tensor:
    """Return the NLL of each token but the first, [tokens - 1] in nats, with weights that learn from each part.

    A part is read together with as many tokens before it as the window has room for, by the weights of then; it is
    scored and then learned from. The rule is that of a learned memory (:mod:`mmrec.inference.learning`), the mixture
    with the model as it was trained included.

    Args:
        gpt: in evaluation mode; it is not changed.
        text: [tokens].
        part: tokens of a part. As many as the window has, and every token is read once; fewer, and windows overlap.
    """
    window, device = len(gpt.positions.weight), device_of(gpt)
    tokens = torch.from_numpy(text.astype(np.int64)).to(device)
    net, trained, found = copy.deepcopy(gpt), dict(gpt.named_parameters()), []
    parameters, learned = dict(net.named_parameters()), _nothing_learned(trained)
    for begin in tqdm(range(0, len(text) - 1, part), desc="the GPT learns", disable=not sys.stderr.isatty()):
        targets = tokens[begin + 1 : begin + part + 1]
        end = begin + len(targets)
        inputs = tokens[max(0, end - window) : end][None]
        with torch.no_grad():
            untouched = gpt(inputs)[0][0, -len(targets) :].float()
        logits = net(inputs)[0][0, -len(targets) :].float()
        mixture, mix, curvature = mix_part(learned, torch.stack([untouched, logits.detach()]), targets)
        found.append(token_nll(mixture, targets).cpu())
        gradients = torch.autograd.grad(token_nll(logits, targets, "mean"), list(parameters.values()))
        difference, squares = updated_weights(learned, dict(zip(parameters, gradients, strict=True)))
        learned = replace(learned, difference=difference, squares=squares, mix=mix, curvature=curvature)
        learned = replace(learned, updates=learned.updates + 1)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name] + difference[name])
    return torch.cat(found).double()


def _nothing_learned(trained: dict[str, torch.nn.Parameter]) -> LearnedWeights:
    """Return what a model of these parameters has learned at first, which keeps no state."""
    none = torch.zeros(0)
    return LearnedWeights(
        form="full",
        compiled=False,
        difference={name: torch.zeros_like(x, dtype=torch.float16) for name, x in trained.items()},
        squares={name: none.new_zeros(shape) for name, shape in squares_shapes(trained).items()},
        updates=0,
        state=[],
        untouched=[],
        logits=none,
        tokens=none.long(),
        mix=torch.tensor(INITIAL_MIX, dtype=torch.float64),
        curvature=torch.zeros(2, 2, dtype=torch.float64),
    )
