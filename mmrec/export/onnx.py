"""One step of the model as ONNX: a token and the state in, the logits and the state out."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxscript import opset18 as op
from torch import Tensor, nn

from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.state_file import model_hash
from mmrec.export.tokenizer import fast_tokenizer
from mmrec.model import RecurrentLM, State

FORMAT, VERSION = "mmrec-onnx", "1"
MAX_EMBEDDED_BYTES = 2**31 - 2**20
"""Bytes of weights that the file itself holds (protobuf ends at 2 GiB); more of them go to ``model.onnx.data``."""


def _expm1(x: Any) -> Any:
    """exp(x) - 1, which ONNX does not have, from an operation that is exact near 0.

    Computed as written, 1 - a^2 loses its digits where the decay a is close to 1.
    """
    half = op.Tanh(op.Mul(x, 0.5))
    return op.Div(op.Mul(half, 2.0), op.Sub(1.0, half))


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """log(1 + exp(x)), exact also where it is small: log(1 + y) is 2 atanh(y / (y + 2))."""
    y = op.Exp(op.Neg(op.Abs(x)))
    return op.Add(op.Relu(x), op.Mul(op.Atanh(op.Div(y, op.Add(y, 2.0))), 2.0))


EXACT_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.expm1.default: _expm1,
    torch.ops.aten.softplus.default: _softplus,
}


class DecodeStep(nn.Module):
    """A token of each row [B, 1] and the state in; the logits of the next [B, N] and the state out."""

    def __init__(self, net: RecurrentLM) -> None:
        super().__init__()
        self.net = net
        self.vocab_size = len(net.head.weight)

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        # ONNX counts negative indices from the end, and would read another token: N is one that it refuses.
        tokens = torch.where(tokens < 0, self.vocab_size, tokens)
        logits, state = self.net(tokens, state)
        return logits[:, -1], state


def save(folder: Path, trained: LoadedModel, weights: str = "f32") -> None:
    """Write ``model.onnx``, and beside it ``tokenizer.json`` of the library tokenizers.

    ``weights`` is what matrices are stored as: f32, f16 or int8. All is computed in float32.

    The state has the names of a file of ``mmrec read``: 0.past, 0.memory, 1.past, and so on; the state that comes
    out is next.0.past, and so on.
    """
    net, tokenizer = trained.net, trained.tokenizer
    state = net.zero_state(2)
    names = [f"{number}.{part}" for number in range(len(state)) for part in ("past", "memory")]
    rows = {0: torch.export.Dim("B")}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            DecodeStep(net).eval(),
            (torch.zeros(2, 1, dtype=torch.int64), state),
            dynamo=True,
            dynamic_shapes={"tokens": rows, "state": [(rows, rows) for _ in state]},
            input_names=["tokens", *names],
            output_names=["logits", *(f"next.{name}" for name in names)],
            custom_translation_table=EXACT_TRANSLATIONS,
            verbose=False,
        )
    assert program is not None
    metadata = {"format": FORMAT, "version": VERSION, "model": model_hash(net, tokenizer)}
    program.model.metadata_props.update(metadata)
    size = sum(weight.nbytes for weight in net.parameters())
    program.save(folder / "model.onnx", external_data=size > MAX_EMBEDDED_BYTES)
    if weights != "f32":
        _store_smaller(folder / "model.onnx", weights)
    fast_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))


def _store_smaller(path: Path, weights: str) -> None:
    """Store the matrices of the model at ``path`` as float16, or as int8 with a scale a channel."""
    model = onnx.load(path)
    graph = model.graph
    reader = {name: node.op_type for node in graph.node for name in node.input}
    back: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            stored.append(tensor)
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if weights == "f16":
            stored.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.f16"))
            back.append(helper.make_node("Cast", [f"{name}.f16"], [name], to=TensorProto.FLOAT))
            continue
        axis = int(reader[name] == "MatMul")  # a channel of the output is a column there, and a row of the embedding
        scale = np.maximum(np.abs(values).max(axis=1 - axis), np.finfo(np.float32).tiny) / 127
        whole = np.rint(values / np.expand_dims(scale, 1 - axis)).astype(np.int8)
        stored.append(numpy_helper.from_array(whole, f"{name}.int8"))
        stored.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
        back.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=axis))
    nodes = [*back, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(stored)
    graph.node.extend(nodes)
    size = sum(math.prod(tensor.dims) * (1 if tensor.data_type == TensorProto.INT8 else 4) for tensor in stored)
    path.unlink()
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=size > MAX_EMBEDDED_BYTES, location=beside.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of the libraries that are about one another and not about the model."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")  # torchvision is not installed
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: B will not be used", UserWarning)
            yield
    finally:
        registry.setLevel(level)
