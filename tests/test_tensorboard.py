"""What the TensorBoard page shows: measured at validations, and without a trace in the training."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Command
from helpers import assert_same_training, fit, last, losses

from mmrec.checkpoints.loading import load_model
from mmrec.data.store import open_tokens
from mmrec.model.statistics import layer_statistics
from mmrec.training.callbacks import measurements
from mmrec.training.callbacks.measurements import RecurrentLayerStatistics, samples_table
from mmrec.training.callbacks.tensorboard import CHARTS


def events(run: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"lightning_logs/{run}", size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    found.Reload()
    return found


def test_the_memories_are_shown(mmrec: Command, prepared: Path) -> None:
    shape = "--model.config={dim: 16, layers: 2, layer_types: [short, long], heads: 2, ffn_dim: 24}"
    assert mmrec(*fit(prepared, shape, "--trainer.max_epochs=2", "--run=a")) == 0
    found = events("a")
    tags = set(found.Tags()["scalars"])
    gates = {"layer0_short": ("recurrence", "input", "output"), "layer1_long": ("write", "output")}
    assert {tag for tag in tags if tag.startswith("val_gate/")} == {
        f"val_gate/{layer}_{gate}" for layer, names in gates.items() for gate in names
    }
    steps = [event.step for event in found.Scalars("val/loss")]
    for tag in tags:
        if tag.startswith("val_"):
            assert [event.step for event in found.Scalars(tag)] == steps, tag
    # The last figures are those of the model that was saved then.
    net = load_model(Path("lightning_logs/a/checkpoints/last.ckpt")).net
    tokens = torch.tensor(open_tokens(prepared).val[: RecurrentLayerStatistics.LENGTH].astype("int64"))
    for number, layer in enumerate(layer_statistics(net, tokens)):
        name = f"layer{number}_{layer.kind}"
        logged = found.Scalars(f"val_half_life/{name}")[-1].value
        assert logged == pytest.approx(float(layer.half_lives.median()), rel=1e-4)
        assert found.Scalars(f"val_state_norm/{name}")[-1].value == pytest.approx(layer.state_norm, rel=1e-3)
        histogram = found.Histograms(f"val_half_life_log2/{name}")[-1].histogram_value
        assert histogram.num == len(layer.half_lives)
        assert 2**histogram.max == pytest.approx(float(layer.half_lives.max()), rel=1e-3)
    # Custom scalars name only tags that are there.
    for charts in CHARTS.values():
        for _, patterns in charts.values():
            assert all(any(re.fullmatch(pattern, tag) for tag in tags) for pattern in patterns)


def test_the_bands_of_position_add_up_to_the_loss(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.max_epochs=1", "--run=a")) == 0
    found = events("a")
    count = len(open_tokens(prepared).val)
    begins = [0, 1024, 2048]
    assert {tag for tag in found.Tags()["scalars"] if "position" in tag} == {
        f"val_loss_by_position/from_{begin}" for begin in begins
    }
    sizes = [1023, 1024, count - 2048]  # the first token is not scored
    total = sum(
        size * found.Scalars(f"val_loss_by_position/from_{begin}")[-1].value
        for size, begin in zip(sizes, begins, strict=True)
    )
    assert total / (count - 1) == pytest.approx(found.Scalars("val/loss")[-1].value, abs=1e-5)


def test_samples_stand_side_by_side_also_after_resuming(mmrec: Command, prepared: Path) -> None:
    every = "--trainer.val_check_interval=7"
    assert mmrec(*fit(prepared, every, "--trainer.max_steps=14", "--trainer.max_epochs=-1", "--run=a")) == 0
    assert mmrec("fit", "--run=a", "--ckpt_path=last", "--trainer.max_steps=28") == 0
    # Of files that were begun in one second the order is that of their names, in which 10 comes before 9.
    newest = max(events("a").Tensors("progress/text_summary"), key=lambda event: event.step)
    table = newest.tensor_proto.string_val[0].decode()
    rows = table.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["7", "14", "21", "28"]
    logged = losses("a", "val/loss")
    assert [float(row.split(" | ")[1]) for row in rows] == pytest.approx(list(logged.values()), abs=1e-4)


def test_the_table_stays_small(mmrec: Command, prepared: Path) -> None:
    assert mmrec(*fit(prepared, "--trainer.val_check_interval=1", "--trainer.max_steps=40", "--run=a")) == 0
    rows = next(state["rows"] for name, state in last("a")["callbacks"].items() if name.startswith("TextSample"))
    assert 12 <= len(rows) <= 24
    assert rows[0][0] == 1
    assert rows[-1][0] == 40


@pytest.mark.filterwarnings("ignore:html5lib:DeprecationWarning")
def test_any_text_is_shown_as_it_is() -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    texts = ["a|b *c* _d_ `e` <script>x</script> [l](u) # h", "\\*&amp;\n\n    - 1. \u0131\u0130\n", ""]
    shown = markdown_to_safe_html(samples_table([[1, None, texts[0]], [2, 1.5, texts[1]], [3, 2.0, texts[2]]]))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown, re.DOTALL)
    assert len(cells) == 9
    assert cells[0:9:3] == ["1", "2", "3"]
    assert cells[1:9:3] == ["", "1.5000", "2.0000"]
    assert html.unescape(cells[2]) == texts[0]
    assert html.unescape(cells[5]).startswith("\\*&amp;<br")


def test_what_is_shown_leaves_no_trace_in_the_training(
    mmrec: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--trainer.max_epochs=2", "--trainer.val_check_interval=7", "--model.dropout=0.3"]
    assert mmrec(*fit(prepared, *command, "--run=shown")) == 0
    for callback in (measurements.RecurrentLayerStatistics, measurements.TextSample, measurements.LossByPosition):
        monkeypatch.setattr(callback, "on_validation_end", lambda *_: None)
    assert mmrec(*fit(prepared, *command, "--run=hidden")) == 0
    assert_same_training(last("shown"), last("hidden"))
