"""A page in which a model writes without a server: ``index.html``, opened from a disk or any web server.

The page holds onnxruntime-web, from its package of npm; ``model.js`` beside it holds the decoding step of
:mod:`mmrec.export.onnx` and the tokenizer. It is a script, since a browser loads no other files from a disk.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.export import onnx
from mmrec.export.tokenizer import lettered_tokens
from mmrec.tokenizers import CharacterTokenizer, Tokenizer, byte_alphabet

PACKAGE = "onnxruntime-web"
SCRIPT, BINARY = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""What the page needs of the package's ``dist``."""


def find_runtime(given: Path | None, below: Path | None = None) -> Path:
    """Return the folder with onnxruntime-web's files.

    Args:
        given: the package or its ``dist``; if None, it is looked for in ``node_modules`` of a folder and those above.
        below: that folder; the current one if None.

    Raises:
        UserError: it is not there.
    """
    start = (below or Path()).resolve()
    places = [given] if given is not None else [up / "node_modules" / PACKAGE for up in (start, *start.parents)]
    for place in places:
        for folder in (place, place / "dist"):
            if (folder / SCRIPT).is_file() and (folder / BINARY).is_file():
                return folder
    where = f"in {given}" if given is not None else "in node_modules here or above"
    how = f"npm install {PACKAGE}, or give --runtime its folder"
    raise UserError(f"--format web: there is no {PACKAGE} {where}: {how}")


def save(folder: Path, trained: LoadedModel, weights: str = "f32", runtime: Path | None = None) -> None:
    """Write the page and the model."""
    from_package = find_runtime(runtime)
    tokenizer = _described(trained.tokenizer)
    onnx.save(folder, trained, weights)
    (folder / "tokenizer.json").unlink()
    model = folder / "model.onnx"
    if model.with_name("model.onnx.data").exists():
        raise UserError("--format web: the model is too large for a browser")
    state = [
        [f"{number}.{part}", list(tensor.shape)]
        for number, layer in enumerate(trained.net.zero_state(1))
        for part, tensor in zip(("past", "memory"), layer, strict=True)
    ]
    described = {
        "tokenizer": tokenizer,
        "state": state,
        "parameters": trained.net.parameter_count(),
        "model": _packed(model.read_bytes()),
    }
    model.unlink()
    text = json.dumps(described, ensure_ascii=True)
    (folder / "model.js").write_text(f"window.mmrec = {text};\n", encoding="utf-8")
    page = (Path(__file__).parent / "web.html").read_text(encoding="utf-8")
    for name, file in (("SCRIPT", SCRIPT), ("BINARY", BINARY)):
        page = page.replace(f"{{{{ {name} }}}}", _packed((from_package / file).read_bytes()))
    (folder / "index.html").write_text(page, encoding="utf-8")


def _packed(data: bytes) -> str:
    """Return ``data`` as text, compressed; the same data give the same text."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what the page cuts a text by: each token's bytes in letters (:func:`byte_alphabet`) or its character."""
    if isinstance(tokenizer, CharacterTokenizer):
        return {"kind": "characters", "tokens": list(tokenizer.alphabet), "merges": []}
    tokens, merges = lettered_tokens(tokenizer, "the page")
    if tokenizer.separator is not None:
        tokens[tokenizer.separator] = byte_alphabet()[10] * 2
    return {"kind": "bytes", "tokens": tokens, "merges": merges, "separator": tokenizer.separator}
