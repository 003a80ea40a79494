"""A model of portable layers as a GGUF file, which llama.cpp and the programs around it run.

The architecture is ``qwen35``, Qwen3.5: a block of it is one of ours. llama.cpp wants at least one block of attention
among them; the one that is added here has weights of zero and adds nothing to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.export.gguf_tokenizer import add_tokenizer
from mmrec.model import FeedForward, ModelConfig, PortableGatedDeltaNet, RecurrentLM, RMSNorm

ARCHITECTURE = "qwen35"
CONTEXT_LENGTH = 32_768
"""Tokens that programs make room for where the user does not say; it is the block of zeros that needs it."""
ATTENTION_HEAD = 64
"""Size of the one head of the block of zeros, which costs 2 * 64 numbers a token of the context."""
QUANTIZED_ROW = 32
"""Numbers of a block of q8_0: rows of a matrix are quantized where their length is a multiple."""

FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def save(folder: Path, trained: LoadedModel, weights: str = "f32") -> None:
    """Write ``model.gguf`` with the tokenizer in it; UserError where GGUF cannot express the model or its tokenizer.

    Args:
        folder: where to write.
        trained: the model.
        weights: of matrices: f32, f16 or q8_0. Those of convolutions, norms and decays are float32.
    """
    config = trained.net.config
    _check(config)
    writer = GGUFWriter(folder / "model.gguf", ARCHITECTURE)
    add_tokenizer(writer, trained.tokenizer)
    if trained.chat is not None:
        writer.add_chat_template(trained.chat.jinja())
    _add_config(writer, config)
    kind, file_type = FILE_TYPES[weights]
    writer.add_file_type(file_type)
    for name, values in _tensors(trained.net):
        _add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: ModelConfig) -> None:
    other = config.layer_other_than(["portable"])
    if other is not None:
        raise UserError(
            f"--format gguf: the model has {other} layers, which GGUF has no form for; train one of portable layers "
            "(--config portable-tiny, or --model.config.layer_types [portable])"
        )
    if config.negative_eigenvalues:
        raise UserError("--format gguf: the model has negative_eigenvalues, which GGUF has no form for")
    if config.count_half_lives:
        raise UserError("--format gguf: the model counts tokens (count_half_lives), which GGUF has no form for")
    if config.conv_width < 2:
        raise UserError("--format gguf: the model has conv_width 1; GGUF needs a convolution of at least 2 tokens")


def _add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    blocks = config.layers + 1
    writer.add_name("mmrec")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_layer_norm_rms_eps(RMSNorm.EPSILON)
    writer.add_ssm_conv_kernel(config.conv_width)
    writer.add_ssm_state_size(config.dim // config.heads)
    writer.add_ssm_group_count(config.heads)
    writer.add_ssm_time_step_rank(config.heads)
    writer.add_ssm_inner_size(config.dim)
    # Which blocks are recurrent: all but the last one. Older versions of llama.cpp read the second key alone.
    writer.add_array(f"{ARCHITECTURE}.attention.recurrent_layers", [True] * config.layers + [False])
    writer.add_uint32(f"{ARCHITECTURE}.full_attention_interval", blocks)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(ATTENTION_HEAD)
    writer.add_value_length(ATTENTION_HEAD)
    writer.add_rope_dimension_count(ATTENTION_HEAD)
    writer.add_rope_dimension_sections([11, 11, 10, 0])


def _add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, kind: GGMLQuantizationType) -> None:
    if values.ndim == 1 or name.endswith("ssm_conv1d.weight"):
        kind = GGMLQuantizationType.F32
    if kind == GGMLQuantizationType.Q8_0 and values.shape[-1] % QUANTIZED_ROW:
        kind = GGMLQuantizationType.F16
    if kind == GGMLQuantizationType.Q8_0:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.astype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32))


def _tensors(net: RecurrentLM) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the file by their names there, float32."""
    yield "token_embd.weight", _numbers(net.embedding.weight)
    yield "output_norm.weight", _numbers(net.norm.weight)
    if not net.config.tie_embeddings:
        yield "output.weight", _numbers(net.head.weight)
    for number, (block, layer) in enumerate(zip(net.blocks, net.recurrent_layers(), strict=True)):
        ffn = block.get_submodule("ffn")
        assert isinstance(layer, PortableGatedDeltaNet)
        assert isinstance(ffn, FeedForward)
        parts = _recurrent(layer) | _feed_forward(ffn)
        parts["attn_norm.weight"] = _numbers(block.get_parameter("memory_norm.weight"))
        parts["post_attention_norm.weight"] = _numbers(block.get_parameter("ffn_norm.weight"))
        yield from ((f"blk.{number}.{name}", values) for name, values in parts.items())
    for name, values in _block_of_zeros(net.config).items():
        yield f"blk.{net.config.layers}.{name}", values


def _recurrent(layer: PortableGatedDeltaNet) -> dict[str, np.ndarray]:
    qkv, decay, beta, gate = layer.project.weight.split(layer.sizes)
    return {
        "attn_qkv.weight": _numbers(qkv),
        "attn_gate.weight": _numbers(gate),
        "ssm_alpha.weight": _numbers(decay),
        "ssm_beta.weight": _numbers(beta),
        "ssm_conv1d.weight": _numbers(layer.conv.weight),
        "ssm_a": _numbers(-layer.log_rate.exp()),
        "ssm_dt.bias": _numbers(layer.decay_bias),
        "ssm_norm.weight": _numbers(layer.norm.weight),
        "ssm_out.weight": _numbers(layer.output.weight),
    }


def _feed_forward(ffn: FeedForward) -> dict[str, np.ndarray]:
    up, gate = ffn.project.weight.chunk(2)
    output = ffn.output.weight
    return {"ffn_up.weight": _numbers(up), "ffn_gate.weight": _numbers(gate), "ffn_down.weight": _numbers(output)}


def _block_of_zeros(config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the block of attention: both of its branches are zero, whatever is in the stream."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (config.dim,),
        "attn_q.weight": (2 * ATTENTION_HEAD, config.dim),  # a query, and a gate of the output
        "attn_k.weight": (ATTENTION_HEAD, config.dim),
        "attn_v.weight": (ATTENTION_HEAD, config.dim),
        "attn_output.weight": (config.dim, ATTENTION_HEAD),
        "attn_q_norm.weight": (ATTENTION_HEAD,),
        "attn_k_norm.weight": (ATTENTION_HEAD,),
        "post_attention_norm.weight": (config.dim,),
        "ffn_up.weight": (config.ffn_dim, config.dim),
        "ffn_gate.weight": (config.ffn_dim, config.dim),
        "ffn_down.weight": (config.dim, config.ffn_dim),
    }
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


def _numbers(values: Tensor) -> np.ndarray:
    found: np.ndarray = values.detach().float().cpu().contiguous().numpy()
    return found
