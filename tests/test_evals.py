"""The synthetic tasks have right answers that cannot be guessed; the evaluations measure what they say."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from helpers import checkpoints

from mmrec.baselines.models import GPT
from mmrec.checkpoints.loading import LoadedModel, load_model
from mmrec.data.batches import IGNORE_INDEX
from mmrec.data.store import open_tokens
from mmrec.evals.carry import bands, carried, windowed
from mmrec.evals.length import by_position, span_nll
from mmrec.evals.models import BASELINES, OURS, SelectiveLogits, layer_parameters, make_model
from mmrec.evals.peer import gpt_hyperparameters, learned_nll, train_gpt
from mmrec.evals.recipes import FULL, SMALL
from mmrec.evals.tasks import MQAR, PERMUTATIONS, S5, Copy, Induction, KeyValue, Parity, Passkey, Task
from mmrec.evals.training import Recipe, sample_level, train
from mmrec.inference.learning import LEARNING_RATES, MIX_BLOCK
from mmrec.model import ModelConfig, RecurrentLM

SHAPE = ModelConfig(dim=16, layers=2, layer_types=("long",), heads=2, ffn_dim=16)


def permutation(numbers: list[int]) -> list[int]:
    """Carry out permutations one after the other on five things, and return where each lies then."""
    things = list(range(5))
    for number in numbers:
        things = [int(PERMUTATIONS[number][thing]) for thing in things]
    return things


def answers(task: Task, row: list[int]) -> dict[int, int]:
    """Return what is to be answered at which place of ``row``, worked out from the row alone, and slowly."""
    found = {}
    if isinstance(task, MQAR):
        half = task.vocab_size // 2
        told: dict[int, int] = {}
        for at, token in enumerate(row):
            if token in told:
                found[at] = told[token]
            elif 0 < token < half:
                told[token] = row[at + 1]
    elif isinstance(task, Passkey):
        first = row.index(task.mark)
        found = {len(row) - 5 + i: row[first + 1 + i] for i in range(5)}
    elif isinstance(task, KeyValue):
        last: dict[int, int] = {}
        for at in range(0, len(row), 2):
            if at >= len(row) - 2 * task.keys:
                found[at] = last[row[at]]
            last[row[at]] = row[at + 1]
    elif isinstance(task, Copy):
        half = len(row) // 2
        found = {half + i: row[i] for i in range(half)}
    elif isinstance(task, Induction):
        found = {len(row) - 1: row[row.index(task.symbols) + 1]}
    elif isinstance(task, Parity):
        found = {at: row[: at + 1].count(1) % 2 for at in range(len(row))}
    elif isinstance(task, S5):
        elements = PERMUTATIONS.tolist()
        found = {at: elements.index(permutation(row[: at + 1])) for at in range(len(row))}
    return found


TASKS: list[tuple[Task, int]] = [
    (MQAR(64), 8), (MQAR(64, tokens_of_a_pair=8), 4), (Passkey(), 40), (KeyValue(4, 8), 12), (Copy(8), 6),
    (Induction(), 12), (Parity(), 9), (S5("swaps"), 9), (S5("all"), 9),
]  # fmt: skip
NAMES = [f"{type(task).__name__} {level}" for task, level in TASKS]


@pytest.mark.parametrize(("task", "level"), TASKS, ids=NAMES)
def test_targets_are_the_answers(task: Task, level: int) -> None:
    inputs, targets = task.batch(np.random.default_rng(1), 50, level)
    assert inputs.shape == targets.shape == (50, task.length(level))
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < task.vocab_size
    assert len((targets != IGNORE_INDEX).sum(1).unique()) == 1
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert {at: token for at, token in enumerate(target) if token != IGNORE_INDEX} == answers(task, row)
    again, _ = task.batch(np.random.default_rng(1), 50, level)
    other, _ = task.batch(np.random.default_rng(2), 50, level)
    assert torch.equal(inputs, again)
    assert not torch.equal(inputs, other)


@pytest.mark.parametrize(("task", "level"), TASKS, ids=NAMES)
def test_answers_cannot_be_guessed(task: Task, level: int) -> None:
    """The most frequent answer at each place, known beforehand, is right no more often than chance says."""
    _, targets = task.batch(np.random.default_rng(3), 6000, level)
    asked = targets[targets != IGNORE_INDEX].view(len(targets), -1)
    if isinstance(task, S5):
        asked = asked[:, 4:]  # the first products are few
    best = max(int(column.bincount().max()) / len(column) for column in asked.T)
    chance = 0.1 if isinstance(task, Passkey) else task.chance(level)  # of a digit alone
    assert best < 1.25 * chance + 0.02


def test_mqar_is_as_zoology_has_it() -> None:
    inputs, targets = MQAR().batch(np.random.default_rng(0), 400, 64)
    assert inputs.shape == (400, 256)
    keys, values = inputs[:, 0:128:2], inputs[:, 1:128:2]
    assert int(keys.min()) >= 1
    assert int(keys.max()) < 4096 <= int(values.min())
    assert all(len(row.unique()) == 64 for row in (*keys, *values))
    assert torch.equal(inputs[:, 128::2].sort(1).values, keys.sort(1).values)
    assert not inputs[:, 129::2].any()
    assert bool((targets[:, 128::2] != IGNORE_INDEX).all())
    # With room to spare most keys are asked for soon after the pairs: about 1 / gap.
    _, targets = MQAR(tokens_of_a_pair=32).batch(np.random.default_rng(0), 4000, 1)
    gaps = np.bincount((targets[:, 2::2] != IGNORE_INDEX).nonzero()[:, 1].numpy(), minlength=15)
    expected = np.arange(1, 16) ** -0.99
    np.testing.assert_allclose(gaps / gaps.sum(), expected / expected.sum(), atol=0.03)


def test_products_of_permutations_are_a_group() -> None:
    products = S5().products
    assert all(len(set(row)) == 120 for row in (*products.tolist(), *products.T.tolist()))
    for a, b, c in itertools.product((3, 50, 119), (7, 64), (11, 90)):
        assert products[products[a, b], c] == products[a, products[b, c]]


def test_what_accuracy_counts() -> None:
    correct = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    assert [task.accuracy(correct) for task in (Copy(), Passkey(), Parity())] == [0.5, 0.25, 0.5]
    assert Parity().accuracy(correct[:3]) == pytest.approx(2 / 3)


def test_levels_come_one_after_the_other() -> None:
    recipe = replace(SMALL["mqar"], train_levels=(4, 8, 16), steps=600)
    random = np.random.default_rng(0)
    parts = [
        [sample_level(recipe, step, random) for step in range(first, first + 100)] for first in range(0, 600, 100)
    ]
    assert [sorted(set(part)) for part in parts] == [[4], [4, 8], [4, 8, 16], *3 * [[4, 8, 16]]]
    assert parts[5].count(16) > 50


@pytest.mark.parametrize("name", [*OURS, *BASELINES])
def test_models_are_of_equal_size_and_score_target_positions_alone(name: str) -> None:
    if name in ("mingru", "mamba2"):
        pytest.importorskip({"mingru": "minGRU_pytorch", "mamba2": "transformers"}[name])
    config = ModelConfig(dim=64, layers=2, layer_types=("long",), heads=2, ffn_dim=64)
    model: Any = make_model(name, config, 33, 16).eval()
    assert 0.8 < layer_parameters(model) / layer_parameters(RecurrentLM(config, 33)) < 1.25
    inputs, targets = Copy(32).batch(np.random.default_rng(0), 3, 8)
    state = None if isinstance(model, GPT) else model.zero_state(3)
    with torch.no_grad():
        every, _ = model(inputs, state)
        scorer = SelectiveLogits(model)
        logits, wanted, _ = scorer(inputs, targets, state)
        loss = scorer.loss(inputs, targets, state)
    assert torch.equal(wanted, targets[targets != IGNORE_INDEX])
    torch.testing.assert_close(logits, every[targets != IGNORE_INDEX], atol=1e-5, rtol=1e-4)
    expected = torch.nn.functional.cross_entropy(every.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def quick(**changes: Any) -> Recipe:
    """A recipe of seconds: which of 4 symbols came after the mark."""
    recipe = Recipe(lambda: Induction(4), SHAPE, (4, 8), (8, 16), 150, tokens=256, learning_rate=1e-2, test_rows=64)
    return replace(recipe, **changes)


def test_a_task_is_learned_and_the_same_seed_gives_the_same_figures() -> None:
    found = train("mmrec", quick(), 0)
    assert found["accuracy"]["8"] > 0.9
    assert found["curve"][-1]["loss"] < found["curve"][0]["loss"] / 2
    one, same, other = (train("mmrec", quick(steps=20), seed) for seed in (1, 1, 2))
    assert one["accuracy"] == same["accuracy"]
    assert one["curve"] == same["curve"] != other["curve"]


def test_a_gpt_stops_at_the_length_that_it_was_trained_on() -> None:
    assert train("gpt", quick(steps=5), 0)["accuracy"]["16"] is None


def test_a_long_row_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quick(steps=30, tokens=1024)  # all test rows at once, however long the parts are
    whole = train("mmrec", recipe, 0)["accuracy"]
    monkeypatch.setattr("mmrec.evals.training.CHUNK", 3)
    assert train("mmrec", recipe, 0)["accuracy"] == whole


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing")
def test_runs_are_kept_and_added_to(
    mmrec: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SMALL, "induction", quick(steps=5))
    assert mmrec("eval", "induction", "--models=[mmrec]") == 0
    first = json.loads(Path("eval/induction.json").read_text())["runs"]
    assert mmrec("eval", "induction", "--models=[mmrec,gpt]", "--seeds=[0,1]") == 0
    both = json.loads(Path("eval/induction.json").read_text())["runs"]
    assert both["mmrec"]["0"] == first["mmrec"]["0"]
    assert {name: list(runs) for name, runs in both.items()} == {"mmrec": ["0", "1"], "gpt": ["0", "1"]}
    assert Path("eval/induction.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:1] == ["chance"] and "25.0" in line for line in table) == 2
    assert mmrec("eval", "induction", "--steps=6") == 2
    assert "of another recipe" in capsys.readouterr().err
    Path("eval/induction.json").write_text("[]")
    assert mmrec("eval", "induction") == 2
    assert "not a file of results" in capsys.readouterr().err


def test_every_recipe_can_be_made() -> None:
    for recipe in (*SMALL.values(), *FULL.values()):
        task = recipe.task()
        for level in (*recipe.train_levels, *recipe.test_levels):
            assert task.length(level) > 0
        assert set(recipe.test_levels) & set(recipe.train_levels)
        task.batch(np.random.default_rng(0), 1, min(recipe.test_levels))


def test_the_same_text_is_scored_after_all_that_stood_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the plain model, read in one go from the place where reading begins."""
    net = RecurrentLM(SHAPE, 11).eval()
    text = np.random.default_rng(0).integers(11, size=500).astype(np.uint16)
    monkeypatch.setattr("mmrec.evals.length.CHUNK", 7)
    starts = np.array([0, 100, 493])
    for before in (1, 3, 7, 8, 50):
        found = span_nll(net, text, starts, before, 20, net.zero_state(3))
        for start, nats in zip(starts, found, strict=True):
            rotated = torch.from_numpy(np.roll(text, before - start)[: before + 20].astype(np.int64))[None]
            with torch.no_grad():
                logits, _ = net(rotated[:, :-1], net.zero_state(1))
            expected = torch.nn.functional.cross_entropy(logits[0], rotated[0, 1:], reduction="none")[-20:]
            torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-4)


def test_positions_score_the_same_blocks() -> None:
    """A model that has no memory at all finds every position the same."""
    net = RecurrentLM(replace(SHAPE, layer_types=("short",), conv_width=1), 11).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.get_parameter("memory.output.weight").zero_()
    text = np.random.default_rng(0).integers(11, size=9000).astype(np.uint16)
    found = by_position(net, text, [1, 100, 4096, 5000], 2)
    np.testing.assert_allclose(found, found[:1].repeat(4, axis=0), rtol=1e-5)


@pytest.fixture
def checkpoint(small_root: Path) -> Path:
    return checkpoints("a", small_root) / "last.ckpt"


def test_a_gpt_is_trained_to_compare_with(prepared: Path) -> None:
    data = open_tokens(prepared)
    before, after = (train_gpt(data, gpt_hyperparameters(64, 4096, 1e-3), 4096 * updates, 0) for updates in (1, 12))
    starts = np.arange(0, 2000, 100)
    losses = [float(span_nll(model, np.asarray(data.val), starts, 8, 56, None).mean()) for model in (before, after)]
    assert losses[1] < losses[0] - 0.05


@pytest.mark.filterwarnings("ignore::DeprecationWarning:matplotlib", "ignore::DeprecationWarning:pyparsing")
def test_length_and_carry_of_a_checkpoint(
    mmrec: Command, prepared: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("book.txt").write_text("1: to be or not to be that is the question\n" * 12)
    options = [f"--ckpt={checkpoint}", f"--data_dir={prepared}"]
    length = ["--positions=[1,64,1024]", "--spans=2", "--learn_to=64", "--gpt_tokens=8192", "--gpt_window=320"]
    assert mmrec("eval", "length", *options, *length) == 0
    curves = json.loads(Path("eval/length.json").read_text())["curves"]
    assert curves["mmrec"]["positions"] == [1, 64, 1024]
    assert curves["mmrec, learned"]["positions"] == [1, 64]
    assert np.array(curves["mmrec, learned"]["losses"]).shape == (2, 2)
    assert curves["GPT, window 320"]["positions"] == curves["GPT, learned"]["positions"] == [1, 64]
    assert np.array(curves["GPT, learned"]["losses"]).shape == (2, 2)
    carry = [*options, "--files=[book.txt]", "--window=64", "--gpt_tokens=8192"]
    assert mmrec("eval", "carry", *carry) == 0
    texts = json.loads(Path("eval/carry.json").read_text())["texts"]
    for name in ("length", "carry", "learned", "forms"):
        assert Path(f"eval/{name}.png").read_bytes().startswith(b"\x89PNG")

    trained, text = load_model(checkpoint), np.asarray(open_tokens(prepared).val)
    assert texts[str(prepared)]["carried"] == pytest.approx(float(carried(trained, text).nll.mean()))
    assert texts[str(prepared)]["tokens"] == len(text) - 1
    assert texts["book.txt"]["tokens"] == 12 * 43 - 1
    for result in texts.values():
        assert result["positions"][-1]["end"] == result["tokens"]
        assert result["learned"] < result["carried"]
        assert result["learned, small"] < result["carried"]
        sizes = [result["costs"][kind]["bytes"] for kind in ("carried", "learned, small", "learned")]
        assert 0 < sizes[0] < sizes[1] < sizes[2]
        assert result["GPT, learned"] < result["GPT"]
    capsys.readouterr()
    for arguments, says in [
        (["length", *options, "--positions=[4096]", "--spans=2"], "2 spans and position 4,096 need 5,120"),
        (["length", *options, "--positions=[0,64]"], "numbers of at least 1"),
        (["length", *options, *length, "--gpt_window=99"], "must be above 256"),
        (["length", f"--ckpt={checkpoint}"], "data/shakespeare_plays"),
        (["carry", f"--ckpt={checkpoint}"], "no text to score"),
        (["carry", f"--ckpt={checkpoint}", "--files=[book.txt]", "--gpt_tokens=9"], "that is trained on the text of"),
        (["carry", *options, "--window=100000"], "not more than a window"),
        (["carry", *options, "--files=[nowhere.txt]"], "nowhere.txt: cannot be read"),
    ]:
        assert mmrec("eval", *arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_carried_and_windowed_differ_by_the_memory_alone(checkpoint: Path, prepared: Path) -> None:
    trained, text = load_model(checkpoint), np.asarray(open_tokens(prepared).val)[:300]
    kept = carried(trained, text).nll
    torch.testing.assert_close(windowed(trained.net, text, 1000), kept, atol=1e-4, rtol=1e-4)  # one window is all
    emptied = windowed(trained.net, text, 50)
    torch.testing.assert_close(emptied[:50], kept[:50], atol=1e-4, rtol=1e-4)
    alone = carried(LoadedModel(trained.net, trained.tokenizer, 0), text[50:101]).nll
    torch.testing.assert_close(emptied[50:100], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(emptied[50:100], kept[50:100], atol=1e-3)


def test_a_gpt_learns_from_each_part_after_it_was_scored() -> None:
    """The first part as without learning, each part by the weights that those before have left, none by its own."""
    torch.manual_seed(0)
    gpt, text = GPT(11, 24, dim=16, layers=1, heads=2).eval(), np.random.default_rng(0).integers(11, size=90)
    text[50:] = np.resize(text[30:40], 40)
    before = copy.deepcopy(gpt.state_dict())
    plain = windowed(gpt, text, 24)
    for part in (24, 10):
        found = learned_nll(gpt, text, part)
        assert found.shape == (89,)
        begin = min(part, MIX_BLOCK)  # then the mixture moves
        torch.testing.assert_close(found[:begin], plain[:begin], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found[part : 2 * part], plain[part : 2 * part], atol=1e-5)
        changed = text.copy()
        changed[3 * part + 2 :] = 0
        torch.testing.assert_close(learned_nll(gpt, changed, part)[: 3 * part + 1], found[: 3 * part + 1])
    assert all(torch.equal(weight, before[name]) for name, weight in gpt.state_dict().items())


def test_parts_of_a_gpt_are_read_with_what_its_window_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEARNING_RATES, "full", 0.0)
    torch.manual_seed(0)
    gpt, text = GPT(11, 24, dim=16, layers=1, heads=2).eval(), np.random.default_rng(0).integers(11, size=61)
    found = learned_nll(gpt, text, 10)
    for place in (0, 9, 10, 23, 30, 59):
        end = min(place // 10 * 10 + 10, 60)
        window = torch.from_numpy(text[max(0, end - 24) : place + 1])[None]
        with torch.no_grad():
            logits = gpt(window)[0][0, -1]
        assert float(found[place]) == pytest.approx(float(-logits.log_softmax(-1)[text[place + 1]]), abs=1e-4)


@pytest.mark.parametrize("window", [1, 16, 100, 256])
def test_bands_cover_a_window(window: int) -> None:
    found = bands(window)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == window


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mqra"], "did you mean 'mqar'"),
        (["mqar", "--models=[lstn]"], "did you mean 'lstm'"),
        (["mqar", "--models=[]"], "one entry at least"),
        (["mqar", "--seeds=[-1]"], "cannot be negative"),
        (["mqar", "--steps=0"], "at least 1"),
        (["parity", "--size=full"], "no recipe of size full"),
        (["carry", "--data_dir=x", "--window=0"], "at least 1"),
    ],
)
def test_a_wrong_request_is_refused(
    mmrec: Command, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert mmrec("eval", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("evaluation", ["length", "carry", "context", "induction", "bench"])
@pytest.mark.parametrize(("end", "content"), [(".json", b'{"mine": 1}'), (".png", b"\x89PNG of a camera")])
def test_a_file_of_a_person_is_never_replaced(
    mmrec: Command, capsys: pytest.CaptureFixture[str], evaluation: str, end: str, content: bytes
) -> None:
    """Before anything is read or computed."""
    Path("out").mkdir()
    path = Path("out", ("results" if evaluation == "bench" else evaluation) + end)
    path.write_bytes(content)
    command = ["bench"] if evaluation == "bench" else ["eval", evaluation]
    text = ["--ckpt=none.ckpt", "--data_dir=none"] if evaluation in ("length", "carry") else []
    if evaluation == "context":
        text = ["--ckpt=none.ckpt", "--files=[none.txt]"]
    assert mmrec(*command, *text, "--output_dir=out") == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "another --output_dir" in error
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["learned.png", "forms.png"])
def test_no_picture_of_a_person_is_replaced(mmrec: Command, capsys: pytest.CaptureFixture[str], name: str) -> None:
    Path("out").mkdir()
    Path("out", name).write_bytes(b"\x89PNG of a camera")
    assert mmrec("eval", "carry", "--ckpt=none.ckpt", "--data_dir=none", "--output_dir=out") == 2
    assert name in capsys.readouterr().err
    assert Path("out", name).read_bytes() == b"\x89PNG of a camera"


def test_what_there_is(mmrec: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert mmrec("eval") == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("length", "carry", "context", "planted", *SMALL))
