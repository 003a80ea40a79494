"""``mmrec report``: a run as one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmrec import __version__
from mmrec.checkpoints.run_log import Curve, Run, read_run
from mmrec.checkpoints.runs import find_folder
from mmrec.core.files import refuse_to_replace, write_file
from mmrec.report.charts import Line, line_chart, spread_chart

Rows = list[tuple[str, str]]


def report(run: str, output: Path = Path("report.html"), root: Path = Path()) -> None:
    """Write the report of a run: one page that opens without a network.

    Args:
        run: its name, or its folder.
        output: file to write.
        root: folder that holds lightning_logs.
    """
    refuse_to_replace(output, b"<!DOCTYPE html>", "a page", "--output")
    page = render(read_run(find_folder(root, run)))
    write_file(output, page)
    print(f"{output}: {output.stat().st_size:,} bytes")


def render(run: Run) -> str:
    """Return the page about ``run``. Whatever a text in it holds is shown as text."""
    environment = Environment(
        loader=PackageLoader("mmrec.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    start: dict[str, Any] = next((line for line in reversed(run.history) if line["event"] == "start"), {})
    return environment.get_template("page.html").render(
        run=run,
        status=status(run),
        facts=_facts(run),
        charts=list(_charts(run)),
        layers=_layers(run),
        samples=_samples(run),
        starts=[_start(line) for line in run.history],
        hyperparameters=_rows(start.get("hyperparameters", {})),
        environment=_rows(start.get("environment", {})),
        seeds=f"{run.config.get('seed_everything')} (weights, dropout), {run.config['data'].get('seed')} (data)"
        if isinstance(run.config.get("data"), dict)
        else str(run.config.get("seed_everything")),
        checkpoints=[(file.name, f"{file.size:,} bytes", _time(file.time)) for file in run.checkpoints],
        version=__version__,
        now=_time(datetime.now(UTC)),
    )


def status(run: Run) -> str:
    """Return a sentence on how the run ended, or that it has not."""
    if run.ended is not None:
        how = run.ended[0].upper() + run.ended[1:]
        return f"{how}{'' if how.endswith('.') else '.'}"
    logged = f" It last logged at {_time(run.last_logged)}." if run.last_logged else " It has logged nothing yet."
    if run.history:
        return f"No end is noted: it is still going, or was killed.{logged}"
    return f"How it ended is not known: it did not get as far as training, or was made by an older version.{logged}"


def _facts(run: Run) -> Rows:
    facts = [("updates", f"{run.updates:,}")]
    if run.best is not None:
        updates, loss = run.best
        facts.append(("lowest validation loss", f"{loss:.4f} nats/token"))
        facts.append(("reached after", f"{updates:,} updates"))
        for tag, name in (("val/bits_per_byte", "bits per byte"), ("val/nats_per_char", "nats per character")):
            if updates in run.curve(tag):
                facts.append((name, f"{run.curve(tag)[updates]:.4f}"))
    trained = _trained(run)
    if trained is not None:
        facts.append(("time", str(trained)))
    return facts


def _trained(run: Run) -> timedelta | None:
    """Return the time between starts and ends; of a start without an end, to what was last logged."""
    total, began = timedelta(), None
    for line in run.history:
        time = datetime.fromisoformat(line["time"])
        if line["event"] == "start":
            began = time
        elif began is not None:
            total, began = total + (time - began), None
    if began is not None and run.last_logged is not None:
        total += max(timedelta(), run.last_logged.replace(microsecond=0) - began)
    return total or None


def _charts(run: Run) -> Iterator[tuple[str, str, Markup]]:
    """Yield title, explanation and drawing of each chart that there are figures for."""
    losses = [
        Line("training, each batch", list(run.curve("train/loss").items()), faint=True),
        Line("validation, state carried", list(run.curve("val/loss").items()), marked=True),
    ]
    if shown := [line for line in losses if line.points]:
        # Without validations the training stands alone, and is not faint.
        shown = shown if len(shown) > 1 else [Line(shown[0].name, shown[0].points, marked=shown[0].marked)]
        yield "Loss", "", line_chart(shown, "updates", "nats/token")
    bands = sorted(run.group("val_loss_by_position").items(), key=lambda item: int(item[0].removeprefix("from_")))
    if bands:
        about = (
            "The validation text is read once, from its start, with the state carried: its first 1,024 tokens, then "
            "those up to 2,047, and so on. Its parts differ in difficulty: what counts is how the lines differ."
        )
        labels = [_short(int(name.removeprefix("from_"))) for name, _ in bands]
        lines = []
        for updates in _some(sorted(bands[0][1])):
            points = [(place, curve[updates]) for place, (_, curve) in enumerate(bands) if updates in curve]
            lines.append(Line(f"after {updates:,} updates", points, marked=True))
        yield "Loss by position", about, line_chart(lines, "from token", "nats/token", labels)
    rows = {
        tag.partition("/")[2].replace("_", ", "): buckets
        for tag, buckets in sorted(run.histograms.items(), key=lambda item: _number(item[0]))
        if tag.startswith("val_half_life_log2/") and buckets
    }
    if rows:
        about = (
            "Tokens after which half of a layer's state is left, at its mean decay on the validation text: counts of "
            "channels in a short layer, of heads in a long one. What the delta rule overwrites is not in it."
        )
        yield "Half-lives of the layers", about, spread_chart(rows, "half-life, tokens")
    for tag, title, unit in (
        ("train/grad_norm", "Gradient", "norm before clipping"),
        ("train/learning_rate", "Learning rate", "highest of the groups"),
        ("train/tokens_per_second", "Speed", "training tokens/s"),
    ):
        if curve := run.curve(tag):
            line = Line(unit, list(curve.items()), faint=tag.endswith("norm"))
            yield title, "", line_chart([line], "updates", unit)


def _layers(run: Run) -> list[dict[str, str]]:
    """Return a row of the last statistics of each layer."""
    half_lives, norms, gates = (run.group(f"val_{name}") for name in ("half_life", "state_norm", "gate"))
    rows = []
    for name in sorted(half_lives, key=_number):
        row = {"layer": name.replace("_", ", "), "half-life": f"{_last(half_lives[name]):,.1f}"}
        row["state"] = f"{_last(norms[name]):.3f}" if name in norms else ""
        for gate in ("recurrence", "input", "write", "output"):
            curve = gates.get(f"{name}_{gate}")
            row[gate] = f"{_last(curve):.3f}" if curve else ""
        rows.append(row)
    return rows


def _samples(run: Run) -> list[tuple[str, str, str]]:
    """Return updates, loss and text of some samples, from the first to the last."""
    losses = run.curve("val/loss")
    found = []
    for updates in _some(sorted(run.samples), 8):
        loss = f"{losses[updates]:.4f}" if updates in losses else ""
        found.append((f"{updates:,}", loss, run.samples[updates].strip("\n")))
    return found


def _start(line: dict[str, Any]) -> tuple[str, str, str]:
    arguments = line.get("arguments", [])
    what = f"started: mmrec {' '.join(map(str, arguments))}" if line["event"] == "start" else str(line.get("how", ""))
    return _time(datetime.fromisoformat(line["time"])), f"{int(line['step']):,}", what


def _rows(values: dict[str, Any]) -> Rows:
    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return "not known" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    return [(name, str(value) if isinstance(value, bool) else shown(value)) for name, value in values.items()]


def _some(values: list[int], most: int = 4) -> list[int]:
    """Return at most ``most`` of some values, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _last(curve: Curve) -> float:
    return curve[max(curve)]


def _number(tag: str) -> int:
    """Return the number of the layer in ``.../layerN_kind``."""
    return int(tag.rpartition("layer")[2].partition("_")[0])


def _short(position: int) -> str:
    if position < 1 << 20:
        return str(position) if position < 1024 else f"{position >> 10}k"
    return f"{position >> 20}M"


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")
