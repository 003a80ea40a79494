"""The model card of an exported model: what its run knows of it, as the README.md that the Hub shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mmrec import __version__
from mmrec.checkpoints.loading import LoadedModel
from mmrec.checkpoints.run_log import Run, read_run
from mmrec.checkpoints.runs import CONFIG
from mmrec.data.store import read_manifest

NAME = "README.md"
POINTS = 10
"""Validations that the curve shows."""
HYPERPARAMETERS = ("optimizer", "learning_rate", "weight_decay", "dropout", "batch_size", "seq_len")
ENVIRONMENT = ("mmrec", "commit", "torch", "processor", "devices", "precision")


def write_card(folder: Path, trained: LoadedModel, checkpoint: Path, license: str, repository: str | None) -> None:
    """Write the card of ``trained`` into ``folder``.

    Args:
        folder: of the export.
        trained: the model.
        checkpoint: where it was taken from: what stands in the folder of its run goes into the card.
        license: as the Hub spells it.
        repository: OWNER/NAME, where it is known.
    """
    environment = Environment(loader=PackageLoader("mmrec.export", "."), undefined=StrictUndefined, trim_blocks=True)
    text = environment.get_template("card.md").render(
        head=yaml.safe_dump(_head(license), sort_keys=False),
        name=repository.split("/")[1] if repository else "A model of mmrec",
        repository=repository,
        path=repository or "FOLDER",
        version=__version__,
        model=_model_rows(trained),
        run=_run_facts(checkpoint),
        license=license,
        has_chat=trained.chat is not None,
    )
    (folder / NAME).write_text(text, encoding="utf-8")


def _head(license: str) -> dict[str, Any]:
    tags = ["mmrec", "recurrent", "custom_code"]
    return {"license": license, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def _model_rows(trained: LoadedModel) -> list[tuple[str, str]]:
    net, tokenizer = trained.net, trained.tokenizer
    config = net.config
    return [
        ("parameters", f"{net.parameter_count():,}"),
        ("blocks", f"{config.layers}: {', '.join(net.layer_types())}"),
        ("width; heads; inner width", f"{config.dim}; {config.heads}; {config.ffn_dim}"),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens"),
        ("state of a text, of any length", f"{net.state_size():,} numbers"),
        ("updates", f"{trained.step:,}"),
    ]


def _run_facts(checkpoint: Path) -> dict[str, Any] | None:
    """Return what the folder of the run says, by the parts of the card; None where there is none."""
    folder = checkpoint.resolve().parent.parent
    if not (folder / CONFIG).is_file():
        return None
    run = read_run(folder)
    start: dict[str, Any] = next((line for line in reversed(run.history) if line["event"] == "start"), {})
    return {
        "name": run.name,
        "data": _data_rows(run, folder),
        "figures": _figures(run),
        "curve": _curve(run),
        "settings": _chosen(start.get("hyperparameters"), HYPERPARAMETERS),
        "environment": _chosen(start.get("environment"), ENVIRONMENT),
        "seed": run.config.get("seed_everything"),
    }


def _chosen(found: Any, names: tuple[str, ...]) -> list[tuple[str, str]]:
    values = found if isinstance(found, dict) else {}
    return [(name, str(values[name])) for name in names if values.get(name) is not None]


def _data_rows(run: Run, folder: Path) -> list[tuple[str, str]]:
    """Return what is known of the text: all of the token folder's manifest, where the folder is still there."""
    data = run.config.get("data")
    data = data if isinstance(data, dict) else {}
    corpus, given = data.get("corpus"), data.get("data_dir")
    wanted = Path(given or Path("data") / str(corpus))
    root = folder.parent.parent  # relative paths are from where the training was started, mostly the run's root
    manifest = next((found for place in (wanted, root / wanted) if (found := read_manifest(place)) is not None), None)
    if manifest is None:
        return [("text", str(corpus if corpus not in (None, "null") else wanted.name))]
    described, split = manifest.get("corpus", {}), manifest.get("split", {})
    rows = [("text", str(described.get("title", described.get("name", corpus))))]
    if isinstance(described.get("documents"), int):
        rows.append(("documents", f"{described['documents']:,}"))
    if "sha256" in described:
        rows.append(("sha256 of the text", str(described["sha256"])))
    for part, title in (("train", "training"), ("val", "validation")):
        size = manifest.get("files", {}).get(f"{part}.txt", {}).get("bytes")
        spelled = "" if size is None else f", {size:,} bytes"
        rows.append((f"{title} text", f"{manifest['tokens'][part]:,} tokens{spelled}"))
    if "val_split" in split:
        share = f"{100 * split['val_split']:g} % for validation"
        rows.append(("split", f"{share}: {split['rule']}" if "rule" in split else share))
    return rows


def _figures(run: Run) -> list[tuple[str, str]]:
    if run.best is None:
        return []
    updates, loss = run.best
    rows = [("loss", f"{loss:.4f} nats/token, after {updates:,} updates")]
    for tag, name in (("val/bits_per_byte", "bits per byte"), ("val/nats_per_char", "nats per character")):
        if updates in run.curve(tag):
            rows.append((name, f"{run.curve(tag)[updates]:.4f}"))
    return rows


def _curve(run: Run) -> list[tuple[str, str]]:
    """Return updates and validation loss of some validations, the first and the last among them."""
    points = list(run.curve("val/loss").items())
    places = sorted({round(place * (len(points) - 1) / (POINTS - 1)) for place in range(POINTS)}) if points else []
    return [(f"{updates:,}", f"{loss:.4f}") for updates, loss in (points[place] for place in places)]
