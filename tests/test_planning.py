"""The plan of mmrec train: the law, the choice of model, batches, options, tokenizer, and what they are made from."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from mmrec.core.errors import UserError
from mmrec.data.options import PrepareOptions
from mmrec.data.resolve import resolve_source
from mmrec.data.store import open_tokens
from mmrec.model import ModelConfig, RecurrentLM, layer_parameters
from mmrec.planning.law import LAW, MOST_APART, MOST_TOLD_BY_LENGTH
from mmrec.planning.machine import measure_rates, seconds_per_update, with_processes_that_pay
from mmrec.planning.ngrams import ngram_bits_per_token
from mmrec.planning.options import split_arguments, value_of
from mmrec.planning.plan import (
    FEW_EPOCHS,
    FORWARD_SHARE,
    HALF_LIVES,
    MANY_TOKENS,
    MOST_EPOCHS,
    SHAPES,
    VALIDATION_SECONDS,
    VALIDATION_SHARE,
    Batches,
    Candidate,
    Rate,
    Text,
    choose_batches,
    expected_loss,
    fit_options,
    make_plan,
    regularization,
    shapes_for,
)
from mmrec.planning.source import choose_tokenizers, prepare_texts
from mmrec.planning.text import describe_text, sample, xz_bits_per_byte
from mmrec.training.callbacks.half_way import BEGIN, LATEST

TEXT = Text(1_000_000, 100_000, 65, 1.0, 2.5, 2.4)


def rate_of(shape: int, tokens: float, processes: int = 1) -> Rate:
    """Return the rate of one of the shapes, with its batches for ``TEXT``."""
    return Rate(Candidate.of(SHAPES[shape], TEXT), tokens, processes)


def test_tokens_that_are_read_again_count_for_less() -> None:
    once = LAW.effective_tokens(1e6, 1e6)
    assert once == 1e6
    assert LAW.effective_tokens(1e6, 5e5) == 5e5
    twice, often = LAW.effective_tokens(1e6, 2e6), LAW.effective_tokens(1e6, 1e9)
    assert 1.8e6 < twice < 2e6
    assert often == pytest.approx(1e6 * (1 + LAW.repetition))


def test_more_text_and_more_time_are_expected_to_help() -> None:
    parameters = layer_parameters(SHAPES[1])
    losses = [LAW.relative_loss(parameters, 1e6, tokens) for tokens in (1e5, 1e6, 4e6)]
    assert losses == sorted(losses, reverse=True)
    assert LAW.relative_loss(parameters, 1e5, 1e6) > LAW.relative_loss(parameters, 1e6, 1e6)


def test_what_xz_makes_of_a_text_counts_within_bounds() -> None:
    many = 1e6
    assert LAW.yardstick(2.0, 2.0, many) == 2.0
    assert LAW.yardstick(2.0, 1.5, many) < 2.0 < LAW.yardstick(2.0, 2.5, many)
    assert LAW.yardstick(2.0, 0.0, many) == pytest.approx(2.0 * MOST_APART**-LAW.copies)
    assert LAW.yardstick(2.0, 9.0, many) == pytest.approx(2.0 * MOST_APART**LAW.copies)
    assert LAW.yardstick(0.0, 0.1, many) == 0.0


def test_ngrams_of_a_short_text_are_a_lower_bar() -> None:
    lengths = (50_000, MOST_TOLD_BY_LENGTH, 10 * MOST_TOLD_BY_LENGTH)
    short, long, longer = (LAW.yardstick(2.0, 2.0, tokens) for tokens in lengths)
    assert short < long == longer


def test_ngrams_are_counted_in_parts_from_all_over_a_long_text() -> None:
    tokens = np.arange(100_000)
    assert sample(tokens, 100_000) is tokens
    found = sample(tokens, 50_000)
    assert len(found) == 50_000
    assert (found[0], found[-1]) == (0, 99_999)
    assert np.diff(found).min() == 1
    assert np.diff(found).max() < 510  # of a hundred parts of 500 each


@pytest.mark.parametrize("config", SHAPES[:5], ids=lambda config: f"{config.dim} x {config.layers}")
def test_parameters_are_about_those_of_the_model(config: ModelConfig) -> None:
    net = RecurrentLM(config, 65)
    real = net.parameter_count() - net.embedding.weight.numel()
    assert layer_parameters(config) == pytest.approx(real, rel=0.05)


def test_a_plan_takes_the_model_of_the_least_expected_loss() -> None:
    rates = [
        rate_of(0, 30_000.0),
        rate_of(1, 10_000.0),
        rate_of(2, 4_000.0),
    ]
    for seconds in (5, 60, 3600):
        chosen = make_plan(TEXT, rates, seconds)
        each = [make_plan(TEXT, [rate], seconds) for rate in rates]
        assert chosen == min(each, key=lambda plan: plan.expected)
    short, long = make_plan(TEXT, rates, 5), make_plan(TEXT, rates, 36_000)
    assert layer_parameters(short.config) < layer_parameters(long.config)


def test_a_text_is_not_read_without_end() -> None:
    short = dataclasses.replace(TEXT, train_tokens=10_000)
    plan = make_plan(short, [Rate(Candidate.of(SHAPES[0], short), 30_000.0)], 3600)
    assert MOST_EPOCHS - 2 < plan.epochs <= MOST_EPOCHS
    assert "would not help" in plan.describe(60 * 60, 1)
    assert "would not help" not in make_plan(TEXT, [rate_of(1, 10_000.0)], 60).describe(60, 1)


@pytest.mark.parametrize("tokens", [40, 300, 5_000, 10**6])
def test_batches_leave_a_text_room(tokens: int) -> None:
    for config in SHAPES:
        batches = choose_batches(config, tokens)
        assert batches.rows >= 1
        assert batches.tokens * 2 <= tokens or (batches.rows == 1 and batches.seq_len <= 16)


def test_a_training_that_reads_much_has_more_rows() -> None:
    few, many = (choose_batches(SHAPES[1], 10**6, tokens) for tokens in (MANY_TOKENS - 1, MANY_TOKENS))
    assert (few.rows, many.rows) == (8, 16)
    assert choose_batches(SHAPES[1], 10**6) == few
    assert choose_batches(SHAPES[1], MANY_TOKENS // (FEW_EPOCHS + 1), MANY_TOKENS) == few
    assert choose_batches(SHAPES[-1], 10**6, MANY_TOKENS) == choose_batches(SHAPES[-1], 10**6)


def _dropout(config: ModelConfig, train_tokens: int, epochs: float, vocab_size: int = 65) -> float:
    """Return the dropout of a plan for a model and a text that is read so often."""
    return regularization(config, epochs * train_tokens, train_tokens, vocab_size)["dropout"]


def test_more_epochs_are_regularized_more() -> None:
    dropouts = [_dropout(SHAPES[1], 120_000, epochs) for epochs in (4, 6, 20, 40)]
    assert dropouts == [0.0, 0.1, 0.2, 0.3]


def test_words_are_regularized_sooner_than_characters() -> None:
    dropouts = [_dropout(SHAPES[1], 240_000, epochs, 1024) for epochs in (2, 4, 7, 30, 60)]
    assert dropouts == [0.0, 0.05, 0.1, 0.2, 0.3]
    assert [_dropout(SHAPES[1], 240_000, epochs) for epochs in (2, 4, 7)] == [0.0] * 3


def test_a_model_with_little_room_beside_its_text_is_regularized_less() -> None:
    assert [_dropout(config, 80_000, 26) for config in SHAPES[:3]] == [0.1, 0.3, 0.3]
    assert [_dropout(SHAPES[1], tokens, 7.5) for tokens in (100_000, 320_000)] == [0.1, 0.0]


def test_validations_take_a_small_share_of_the_time() -> None:
    plan = make_plan(dataclasses.replace(TEXT, val_tokens=50_000_000), [rate_of(1, 10_000.0)], 60)
    options = dict(option.removeprefix("--").split("=", 1) for option in fit_options(plan))
    batches, every = int(options["trainer.limit_val_batches"]), int(options["trainer.val_check_interval"])
    scored = batches * plan.batches.tokens * (plan.steps // every)
    assert 0 < scored < 0.25 * plan.tokens


@pytest.mark.parametrize("val_tokens", [1_000, 10_000, 100_000])
def test_what_a_validation_takes_beside_its_tokens_counts_too(val_tokens: int) -> None:
    rate = 10_000.0
    plan = make_plan(dataclasses.replace(TEXT, val_tokens=val_tokens), [rate_of(1, rate)], 120)
    options = dict(option.removeprefix("--").split("=", 1) for option in fit_options(plan))
    times = -(-plan.steps // int(options["trainer.val_check_interval"]))
    scored = min(val_tokens, int(options.get("trainer.limit_val_batches", 10**6)) * plan.batches.tokens)
    seconds = times * (VALIDATION_SECONDS + FORWARD_SHARE * scored / rate)
    assert 0.5 * VALIDATION_SHARE * 120 < seconds <= VALIDATION_SHARE * 120


def test_the_text_is_described(prepared: Path) -> None:
    folder = open_tokens(prepared)
    text = describe_text(folder)
    assert (text.train_tokens, text.val_tokens, text.bytes_per_token) == (len(folder.train), len(folder.val), 1.0)
    assert 0 < text.xz < 8
    assert text.xz == xz_bits_per_byte(folder)


def test_a_trial_changes_no_random_numbers_and_gives_a_time() -> None:
    import torch

    text = dataclasses.replace(TEXT, train_tokens=600)
    before = torch.random.get_rng_state()
    assert 0 < seconds_per_update(Candidate.of(SHAPES[0], text), text, "cpu", 0.01) < math.inf
    assert torch.equal(before, torch.random.get_rng_state())
    batches = Batches(4, 16, 1)
    rates = measure_rates(text, [Candidate(SHAPES[0], batches)], 2.0, "cpu")
    assert [rate.candidate for rate in rates] == [Candidate(SHAPES[0], batches)]
    assert rates[0].tokens > 0


@pytest.mark.parametrize(
    ("pace", "waited", "threads", "count"),
    [(0.15, 1.0, 1, 2), (0.11, 1.0, 1, 1), (0.11, 2.0, 1, 2), (0.11, 1.0, 2, 2), (0.09, 1.0, 2, 1)],
)
def test_several_processes_train_only_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, pace: float, waited: float, threads: int, count: int
) -> None:
    """Two make an update in 0.1 seconds; one in ``pace`` of its own, of which it waits for others so many times."""
    from mmrec.planning import machine

    monkeypatch.setattr(machine, "_try_together", lambda *_: machine._Trial(pace, waited, 1.0, threads))
    two = rate_of(1, 1024 / 0.1, 2)
    found = with_processes_that_pay(two, TEXT, 60.0, "cpu")
    assert found.processes == count
    assert found.tokens == pytest.approx(two.tokens if count == 2 else 1024 / pace / waited)
    assert with_processes_that_pay(alone := rate_of(1, 1.0), TEXT, 60.0, "cpu") == alone


def test_each_process_tries_its_share_of_the_rows() -> None:
    from mmrec.planning import machine

    text = dataclasses.replace(TEXT, train_tokens=600)
    found = machine._try_together(Candidate(SHAPES[0], Batches(8, 16, 1)), text, "cpu", 0.01, 2)
    assert 0 < found.pace < math.inf
    assert found.waited > 0
    plan = make_plan(TEXT, [rate_of(1, 10_000.0, 2)], 60)
    alone = make_plan(TEXT, [rate_of(1, 10_000.0)], 60)
    assert "by 2 processes" in plan.describe(60, 1)
    assert "processes" not in alone.describe(60, 1)
    # At a pace that is the same for both they have the same validations: two share out that text, too.
    scored = [[option for option in fit_options(each) if "val" in option] for each in (plan, alone)]
    assert scored[0] == scored[1]


def test_options_of_fit_are_told_from_those_of_train() -> None:
    own, forwarded = split_arguments(
        [
            "novel.txt",
            "--minutes",
            "3",
            "--model.dropout",
            "0.1",
            "--trainer.max_steps=5",
            "--seed_everything",
            "3",
            "b",
        ]
    )
    assert own == ["novel.txt", "--minutes", "3", "b"]
    assert forwarded == ["--model.dropout", "0.1", "--trainer.max_steps=5", "--seed_everything", "3"]


def test_the_last_value_of_an_option_counts() -> None:
    assert value_of([], "--a") is None
    assert value_of(["--a"], "--a") is None
    assert value_of(["--ab=1", "--b", "--a"], "--a") is None
    assert value_of(["--a=1", "--a", "2", "--b=3"], "--a") == "2"
    assert value_of(["--a", "2", "--a=1=1"], "--a") == "1=1"


@pytest.mark.parametrize(
    ("text", "tokenizers"),
    [
        ("Plain English, as it is.\n" * 20, [("bytes", None)]),
        ("Широка страна моя родная.\n" * 20, [("characters", None)]),
        ("".join(chr(0x4E00 + number) for number in range(900)), [("bpe", 4096)]),
        ("Plain English, as it is.\n" * 5000, [("bytes", None), ("bpe", 1024)]),
        ("Широка страна моя родная.\n" * 15_000, [("characters", None), ("bpe", 1024)]),
        ("Широка страна моя родная.\n" * 30_000, [("bpe", 1024)]),
        ("Plain English, as it is.\n" * 150_000, [("bpe", 4096)]),
    ],
)
def test_the_tokenizers_suit_the_text(tmp_path: Path, text: str, tokenizers: list[tuple[str, int | None]]) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    assert choose_tokenizers(resolve_source(PrepareOptions(str(path)))) == tokenizers


def test_the_tokenizer_of_a_folder_is_chosen_by_its_size(tmp_path: Path) -> None:
    """As of files that are read one after the other, not held in memory."""
    for number, length in enumerate((10_000, 1_200_000)):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": "word " * (length // 5)}) + "\n")
        found = choose_tokenizers(resolve_source(PrepareOptions(str(tmp_path))))
        assert found == [[("bytes", None), ("bpe", 1024)][number]]


def test_a_text_that_was_prepared_keeps_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may choose another for it, and the training of the earlier one is to go on."""
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("One sentence of many words, " * 200 + "\nand another one.\n" * 200)
    assert [each.tokenizer.name for each in prepare_texts(["novel.txt"], None)] == ["bytes"]
    monkeypatch.setattr("mmrec.planning.source.FEW_WORDS", 10)
    monkeypatch.setattr("mmrec.planning.source.ENOUGH_WORDS", 20)
    assert [each.tokenizer.name for each in prepare_texts(["novel.txt"], None)] == ["bytes"]
    Path("data/novel").rename("data/before")
    (words,) = prepare_texts(["novel.txt"], None)
    assert words.tokenizer.name == "bpe"
    assert prepare_texts(["novel.txt"], "bpe")[0].tokenizer.digest() == words.tokenizer.digest()
    with pytest.raises(UserError, match="another corpus, split or tokenizer"):
        prepare_texts(["novel.txt"], "characters")


def test_a_text_that_may_be_read_both_ways_is_prepared_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("One sentence of many words, " * 200 + "\nand another one.\n" * 200)
    monkeypatch.setattr("mmrec.planning.source.FEW_WORDS", 10)
    both = [Path("data/novel"), Path("data/novel-bpe")]
    assert [each.folder for each in prepare_texts(["novel.txt"], None)] == both
    assert [each.folder for each in prepare_texts(["novel.txt"], None)] == both
    begun = prepare_texts(["novel.txt"], None, is_begun=lambda path: path == both[1])
    assert [(each.folder, each.tokenizer.name) for each in begun] == [(both[1], "bpe")]


def test_both_ways_are_prepared_after_a_stop_between_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C: what is there by then is not taken for what was asked for."""
    from mmrec.data.prepare import prepare
    from mmrec.planning import source

    monkeypatch.chdir(tmp_path)
    Path("novel.txt").write_text("One sentence of many words, " * 200 + "\nand another one.\n" * 200)
    monkeypatch.setattr(source, "FEW_WORDS", 10)

    def stopped(options: PrepareOptions) -> object:
        if Path("data").exists():
            raise KeyboardInterrupt
        return prepare(options)

    monkeypatch.setattr(source, "prepare", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare_texts(["novel.txt"], None)
    assert len([*Path("data").iterdir()]) == 1
    monkeypatch.setattr(source, "prepare", prepare)
    both = [Path("data/novel"), Path("data/novel-bpe")]
    assert [each.folder for each in prepare_texts(["novel.txt"], None)] == both


def test_a_corpus_with_a_name_is_read_by_words_beside_its_own_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configs mean the token folder of its name, by its own tokenizer; what an earlier version began goes on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmrec.planning.source.ENOUGH_WORDS", 100_000)
    (words,) = prepare_texts(["sample"], None)
    assert (words.tokenizer.name, words.tokenizer.vocab_size) == ("bpe", 1024)
    assert words.folder == Path("data/sample-bpe")
    (plain,) = prepare_texts(["sample"], "bytes")
    assert (plain.tokenizer.name, plain.folder) == ("bytes", Path("data/sample"))
    assert [each.folder for each in prepare_texts(["sample"], None)] == [words.folder]
    begun = prepare_texts(["sample"], None, is_begun=lambda path: path == plain.folder)
    assert [each.folder for each in begun] == [plain.folder]
    words.folder.rename("elsewhere")
    assert [each.folder for each in prepare_texts(["sample"], None)] == [plain.folder]


def test_models_of_words_count_them_and_others_do_not() -> None:
    assert shapes_for(TEXT) == SHAPES
    words = dataclasses.replace(TEXT, vocab_size=1024)
    assert {config.count_half_lives for config in shapes_for(words)} == {HALF_LIVES}
    plain, counting = (expected_loss(shapes[1], words, 1e6) for shapes in (SHAPES, shapes_for(words)))
    assert counting == plain * LAW.counting
    plan = make_plan(words, [Rate(Candidate.of(shapes_for(words)[1], words), 10_000.0)], 60)
    (config,) = [option for option in fit_options(plan) if "model.config" in option]
    assert json.loads(config.partition("=")[2])["count_half_lives"] == list(HALF_LIVES)


def test_an_n_gram_model_says_what_can_be_reached_of_a_text() -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 16, 20_000)
    assert ngram_bits_per_token(noise[:15_000], noise[15_000:], 16) == pytest.approx(4, abs=0.01)
    repeated = np.tile(np.arange(10), 500)
    assert ngram_bits_per_token(repeated[:4000], repeated[4000:], 10) < 0.01
    # Each token of this is one of two by the one before it, and any of two by those that stand further back.
    chain = np.cumsum(random.integers(0, 2, 20_000)) % 7
    assert ngram_bits_per_token(chain[:15_000], chain[15_000:], 7) == pytest.approx(1, abs=0.02)


def test_interpolation_is_as_witten_and_bell_say() -> None:
    train, val = np.array([0, 1, 0, 1, 1]), np.array([0])
    unigram = (2 + 2 / 3) / (5 + 2)  # of the three tokens that there may be, two were seen, in five places
    bigram = (1 + 2 * unigram) / (2 + 2)  # after 1 came 0 and 1
    assert bigram > unigram
    # Nothing came after 1, 1: the trigrams say what the bigrams do.
    assert 2 ** -ngram_bits_per_token(train, val, 3) == pytest.approx(bigram, rel=1e-9)


@pytest.mark.parametrize("val_tokens", [1_000, 9_000, 40_000, 100_000])
def test_one_validation_is_half_way(val_tokens: int) -> None:
    for seconds in (60, 90, 150, 300):
        plan = make_plan(dataclasses.replace(TEXT, val_tokens=val_tokens), [rate_of(1, 10_000.0)], seconds)
        options = dict(option.removeprefix("--").split("=", 1) for option in fit_options(plan))
        every = int(options["trainer.val_check_interval"])
        assert any(BEGIN <= step / plan.steps <= LATEST for step in range(every, plan.steps, every))
