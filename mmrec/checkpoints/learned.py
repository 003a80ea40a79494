"""What a model has learned from what it read, as a memory file keeps it: a difference to its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmrec.core.errors import UserError
from mmrec.model import RecurrentLM, State, state_to
from mmrec.model.ops import dispatch

Form = Literal["full", "small"]
"""Which weights learn: all, or vectors, convolutions and embeddings."""
PART = 96
"""Tokens that are read with the same weights; after them the weights learn."""
LARGEST_DIFFERENCE = 256.0
"""Of a learned weight to the trained one; learning keeps far below it."""


@dataclass(frozen=True)
class LearnedWeights:
    """What a model has learned from what it read, and what going on with it needs.

    Weights change between parts of :data:`PART` tokens alone, so that they do not depend on where a text was cut: the
    tokens of a part that has not ended are kept, and are read once more with the rest of it.

    Attributes:
        form: which weights learn.
        compiled: whether compiled kernels are used on a CPU, as where the memory was begun: their sums differ from
            torch's in the last bits, and what is learned is not to depend on where a text was cut.
        difference: of each parameter that learns to the trained one, by its name, float16.
        squares: running means of squared gradients by the names of :func:`statistics_shapes`, float32.
        updates: parts that were learned from.
        state: of the model with what it has learned, after the last whole part.
        untouched: of the model as it was trained, there.
        logits: [2, N] of the token after it: of the untouched model, and of the one that learned.
        tokens: [n], int64, n below :data:`PART`: those that were read since.
        mix: [2], float64, on the CPU: weights of the two models' logits in what is predicted.
        curvature: [2, 2], float64, on the CPU: second derivatives of the loss by ``mix``, summed over what was read
            lately.
    """

    form: Form
    compiled: bool
    difference: dict[str, Tensor]
    squares: dict[str, Tensor]
    updates: int
    state: State
    untouched: State
    logits: Tensor
    tokens: Tensor
    mix: Tensor
    curvature: Tensor

    @classmethod
    def empty(cls, net: RecurrentLM, form: Form, state: State, logits: Tensor) -> LearnedWeights:
        """Return what ``net`` has learned at first, nothing, after it has come to ``state`` and ``logits`` [N]."""
        device, weights = logits.device, learned_parameters(net, form)
        return cls(
            form=form,
            compiled=device.type != "cpu" or dispatch.has_native_learning(),
            difference={
                name: torch.zeros(weight.shape, dtype=torch.float16, device=device)
                for name, weight in weights.items()
            },
            squares={name: torch.zeros(shape, device=device) for name, shape in statistics_shapes(net, form).items()},
            updates=0,
            state=[(past.clone(), memory.clone()) for past, memory in state],
            untouched=[(past.clone(), memory.clone()) for past, memory in state],
            logits=torch.stack([logits, logits]),
            tokens=torch.zeros(0, dtype=torch.int64, device=device),
            mix=torch.tensor(INITIAL_MIX, dtype=torch.float64),
            curvature=torch.zeros(2, 2, dtype=torch.float64),
        )

    def to(self, device: torch.device) -> LearnedWeights:
        """Return the same with what the model computes with on ``device``; the mixture's numbers stay on the CPU."""
        return replace(
            self,
            difference={name: x.to(device) for name, x in self.difference.items()},
            squares={name: x.to(device) for name, x in self.squares.items()},
            state=state_to(self.state, device),
            untouched=state_to(self.untouched, device),
            logits=self.logits.to(device),
            tokens=self.tokens.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the numbers by their names in the file."""
        tensors = {f"learned.difference.{name}": x for name, x in self.difference.items()}
        tensors |= {f"learned.squares.{name}": x for name, x in self.squares.items()}
        for title, state in (("state", self.state), ("untouched", self.untouched)):
            for number, (past, memory) in enumerate(state):
                tensors |= {f"learned.{title}.{number}.past": past, f"learned.{title}.{number}.memory": memory}
        tensors |= {"learned.logits": self.logits, "learned.tokens": self.tokens.to(torch.int32)}
        tensors |= {"learned.mix": self.mix, "learned.curvature": self.curvature}
        return tensors

    def metadata(self) -> dict[str, str]:
        """Return what the file says of them beside the numbers."""
        metadata = {"part": str(PART), "learned": self.form, "learned_updates": str(self.updates)}
        return metadata if self.compiled else metadata | {"learned_kernels": "none"}

    @classmethod
    def from_file(cls, net: RecurrentLM, tensors: dict[str, Tensor], metadata: dict[str, str]) -> LearnedWeights:
        """Return what :meth:`tensors` and :meth:`metadata` gave, of the model ``net``.

        The shapes and the dtypes of the tensors, but for the number of tokens, are checked by the caller.

        Raises:
            UserError: a number is none that learning ever makes.
        """
        updates, vocab_size = metadata.get("learned_updates", ""), net.head.weight.shape[0]
        if not re.fullmatch(r"[0-9]{1,18}", updates):
            raise UserError("does not say how often it learned")
        tokens = tensors["learned.tokens"].to(torch.int64)
        if tokens.dim() != 1 or len(tokens) >= PART or ((tokens < 0) | (tokens >= vocab_size)).any():
            raise UserError("holds tokens that the model does not have")
        form = form_of(metadata)
        difference = {n: tensors[f"learned.difference.{n}"].half() for n in learned_parameters(net, form)}
        squares = {name: tensors[f"learned.squares.{name}"] for name in statistics_shapes(net, form)}
        if any((x.abs() > LARGEST_DIFFERENCE).any() for x in difference.values()):
            raise UserError("holds weights larger than learning ever makes them")
        curvature = tensors["learned.curvature"]
        if any((x < 0).any() for x in squares.values()) or not _is_curvature(curvature):
            raise UserError("holds statistics that learning never makes")
        states = {
            title: [
                (tensors[f"learned.{title}.{number}.past"], tensors[f"learned.{title}.{number}.memory"])
                for number in range(net.state_layers())
            ]
            for title in ("state", "untouched")
        }
        return cls(
            form=form,
            compiled=metadata.get("learned_kernels") != "none",
            difference=difference,
            squares=squares,
            updates=int(updates),
            state=states["state"],
            untouched=states["untouched"],
            logits=tensors["learned.logits"],
            tokens=tokens,
            mix=tensors["learned.mix"],
            curvature=curvature,
        )


INITIAL_MIX = (0.4, 0.6)
"""Weights of the two models at first, when they are the same."""


def _is_curvature(matrix: Tensor) -> bool:
    """Whether ``matrix`` is symmetric and has no eigenvalue below 0, but for rounding."""
    return bool(torch.allclose(matrix, matrix.mT) and (torch.linalg.eigvalsh(matrix) > -0.5).all())


def has_parts_of_this_length(metadata: dict[str, str]) -> bool:
    """Return whether the metadata of a file say that its parts are of :data:`PART` tokens, or that it has none."""
    return not {"learned", "cache"} & metadata.keys() or metadata.get("part") == str(PART)


def form_of(metadata: dict[str, str]) -> Form:
    """Return the form that the metadata of a file name; UserError where there is no such."""
    for form in get_args(Form):
        if metadata.get("learned") == form:
            return form  # type: ignore[no-any-return]
    raise UserError("does not say which weights have learned")


def learned_parameters(net: RecurrentLM, form: Form) -> dict[str, nn.Parameter]:
    """Return the parameters of ``net`` that learn, by their names; tied ones count once."""
    tables = {id(net.embedding.weight), id(net.head.weight)}
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if form == "full" or parameter.dim() == 1 or name.endswith("conv.weight") or id(parameter) in tables
    }


def statistics_shapes(net: RecurrentLM, form: Form) -> dict[str, torch.Size]:
    """Return the shapes of the running means of squared gradients of what learns in ``net``, by their names."""
    return squares_shapes(learned_parameters(net, form))


def squares_shapes(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Size]:
    """Return the shapes of the running means of squared gradients of ``parameters``, by their names.

    Of a matrix there are those of its rows and of its columns alone, whose product stands for the whole (Adafactor;
    Shazeer and Stern 2018); of a vector there is one of each number.
    """
    shapes = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            shapes[f"{name}.rows"] = torch.Size((parameter.shape[0], 1))
            shapes[f"{name}.columns"] = torch.Size((1, parameter.shape[1]))
        else:
            shapes[name] = parameter.shape
    return shapes
