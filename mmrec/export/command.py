"""``mmrec export``: a trained model for other programs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from mmrec.checkpoints.hub import check_repository, push_folder
from mmrec.checkpoints.loading import LoadedModel, load_chosen
from mmrec.checkpoints.runs import CheckpointOptions
from mmrec.checkpoints.state_file import load_memory
from mmrec.checkpoints.weights import save_weights
from mmrec.core.errors import UserError
from mmrec.core.files import staged_folder
from mmrec.inference.learning import LearningNet
from mmrec.inference.reading import load_model_of

Format = Literal["hf", "safetensors", "onnx", "mlx", "gguf", "web"]
Weights = Literal["f32", "f16", "int8", "q8_0"]
WEIGHTS = {
    "hf": ("f32",),
    "safetensors": ("f32",),
    "onnx": ("f32", "f16", "int8"),
    "mlx": ("f32",),
    "gguf": ("f32", "f16", "q8_0"),
    "web": ("f32", "f16", "int8"),
}
"""The numbers that each format can store the weights as."""
EXPORTED_FILES = re.compile(
    r"README\.md|mmrec\.json|(generation_|tokenizer_)?config\.json|special_tokens_map\.json|tokenizer\.json|__pycache__"
    r"|modeling_mmrec\.py|mlx_model\.py|model.*\.safetensors(\.index\.json)?|model\.onnx(\.data)?|model\.gguf|model\.js"
    r"|index\.html|chat_template\.jinja"
)
"""Files of an export: a folder that holds others is never replaced."""


@dataclass(frozen=True)
class ShareOptions:
    """How an export is shared.

    Args:
        card: write README.md beside the model, the card that the Hugging Face Hub shows: data, split, figures with
            their protocol and curve from the run, intended use, licence, how to load it. For hf.
        license: of the model, as the Hub spells it (mit, apache-2.0, cc-by-4.0, ...), for the card.
        push: OWNER/NAME, a repository of the Hub to send the folder to; it is made, private, if there is none.
    """

    card: bool = False
    license: str = "unknown"
    push: str | None = None


def export(
    checkpoint: CheckpointOptions,
    share: ShareOptions,
    format: Format,
    output_dir: Path,
    weights: Weights = "f32",
    memory: Path | None = None,
    runtime: Path | None = None,
    force: bool = False,
) -> None:
    """Write a trained model as a folder that other programs read.

    Args:
        format: hf, a folder for transformers; safetensors, one file with weights, config and tokenizer, which every
            --ckpt takes too; onnx, one decoding step with the state in and out, for onnxruntime; mlx, a folder with
            the code that runs it in MLX, on Apple's processors above all; gguf, one file for llama.cpp, of a model of
            portable layers; web, a page that writes in a browser.
        output_dir: folder to write; it must be new or empty.
        weights: numbers that the matrices are stored as: f32; f16, for onnx, web and gguf; int8, for onnx and web;
            q8_0, 8 bits in blocks, for gguf.
        checkpoint: of the model.
        share: how it is shared.
        memory: export the model with what it learned from what it read, a file of mmrec read --learn, as a model of
            its own: its weights, not its state. Where no model is named it is that of the latest run whose model
            the memory is of.
        runtime: of the page, for web: the folder of the npm package onnxruntime-web; node_modules here or above if
            left out.
        force: replace another export that stands at output_dir.

    Raises:
        UserError: something that was given is wrong; nothing has been changed.
    """
    if weights not in WEIGHTS[format]:
        raise UserError(f"--weights {weights}: --format {format} takes {', '.join(WEIGHTS[format])}")
    if runtime is not None and format != "web":
        raise UserError(f"--runtime: it is of the page; --format {format} has none")
    _check_share(format, share)
    _check_target(output_dir, force)
    if memory is None:
        trained = load_chosen(checkpoint)
    else:
        checkpoint, trained, digest = load_model_of(checkpoint, memory)
        trained = learned_model(trained, digest, memory)
    trained.net.cpu()  # the formats are written from there
    with staged_folder(output_dir) as folder:
        _write(format, folder, trained, weights, runtime)
        if share.card:
            card = import_module("mmrec.export.card")
            card.write_card(folder, trained, checkpoint.path(), share.license, share.push)
    size = sum(path.stat().st_size for path in output_dir.iterdir())
    print(f"{output_dir}: {', '.join(sorted(path.name for path in output_dir.iterdir()))} ({size:,} bytes)")
    if share.push is not None:
        print(f"pushed to {push_folder(output_dir, share.push)}")


def _check_share(format: Format, share: ShareOptions) -> None:
    if share.card and format != "hf":
        raise UserError(f"--card: it says how to load a model in transformers; --format {format} has none")
    if share.license != ShareOptions.license and not share.card:
        raise UserError("--license: it stands in the card; add --card")
    if share.push is not None:
        check_repository(share.push)


def learned_model(trained: LoadedModel, digest: str, memory: Path) -> LoadedModel:
    """Return the model of hash ``digest`` with what it learned by ``memory``; UserError where that is nothing."""
    learned = load_memory(memory, trained.net, digest).learned
    if learned is None:
        raise UserError(f"{memory}: holds nothing that was learned; read the text with --learn")
    weights = LearningNet(trained.net, learned.form)
    weights.set_difference(learned.difference)
    return replace(trained, net=weights.net.requires_grad_(True))


def _write(format: Format, folder: Path, trained: LoadedModel, weights: Weights, runtime: Path | None) -> None:
    if format == "safetensors":
        save_weights(folder / "model.safetensors", trained.net, trained.tokenizer, trained.step, trained.chat)
        return
    try:
        module = import_module(f"mmrec.export.{format}")
    except ImportError as error:
        raise UserError(f"--format {format} needs {error.name}: pip install 'mmrec[export]'") from None
    try:
        options: dict[str, object] = {"weights": weights} if len(WEIGHTS[format]) > 1 else {}
        module.save(folder, trained, **options | ({"runtime": runtime} if format == "web" else {}))
    except SafetensorError as error:  # of a full disk, too
        raise UserError(f"the export cannot be written: {error}") from None


def _check_target(folder: Path, force: bool) -> None:
    """Refuse what must not be overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is not a folder; choose another --output_dir")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    strangers = [name for name in found if not EXPORTED_FILES.fullmatch(name)]
    if strangers:
        raise UserError(f"{folder}: holds something else ({strangers[0]}); choose a new or empty --output_dir")
    if found and not force:
        raise UserError(f"{folder}: already holds an export; choose another --output_dir, or replace it by --force")
