"""Every option by which programs call a causal model of transformers: the right result, or one clear error."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from models import made
from test_export_hf import exported, folders
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.export.hf import saving
from mmrec.model import LAYER_TYPES, ModelConfig
from mmrec.tokenizers import ByteTokenizer, CharacterTokenizer

__all__ = ["folders"]  # a fixture that every test here takes

PROMPTS = ["the the the, then", "ere", "Iğdır", "and"]


@pytest.fixture
def exports(tmp_path: Path) -> tuple[LoadedModel, Any, Any]:
    trained = made(ByteTokenizer())
    return trained, *exported(trained, tmp_path / "out")


@pytest.fixture
def model(exports: tuple[LoadedModel, Any, Any]) -> Any:
    return exports[1]


@pytest.fixture
def fast(exports: tuple[LoadedModel, Any, Any]) -> Any:
    return exports[2]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids_of(fast: Any, text: str) -> Tensor:
    ids: Tensor = fast(text, return_tensors="pt").input_ids
    return ids


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def greedy(model: Any, *args: Any, **options: Any) -> Tensor:
    written: Tensor = model.generate(*args, max_new_tokens=12, do_sample=False, **options)[:, -12:]
    return written


# Labels and padding


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels_of", ["ids", "ignored", "shifted"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(
    model: Any, fast: Any, side: str, labels_of: str, with_mask: bool
) -> None:
    total, count = 0.0, 0
    for prompt in PROMPTS:
        ids = ids_of(fast, prompt)
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    batch = fast(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    labels, more = batch.input_ids, {}
    if labels_of == "ignored":
        labels = labels.masked_fill(batch.attention_mask == 0, -100)
    elif labels_of == "shifted":
        begin = batch.attention_mask.cumsum(1) <= 1
        more["shift_labels"] = torch.nn.functional.pad(labels.masked_fill(begin, -100)[:, 1:], (0, 1), value=-100)
    mask = batch.attention_mask if with_mask else None
    loss = model(batch.input_ids, attention_mask=mask, labels=labels, **more).loss
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_the_loss_over_accumulated_batches_is_a_sum_over_their_tokens(model: Any, fast: Any) -> None:
    ids = ids_of(fast, PROMPTS[0])
    whole, part = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=32).loss
    close(part, whole * (ids.shape[1] - 1) / 32)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([[1, 2]]), "labels is"),
        (torch.tensor([[1, 2, 300]]), "0 to 255"),
        (torch.tensor([[1, 2, -1]]), "0 to 255"),
        (torch.tensor([[1, -100, -100]]), "no token is scored"),
    ],
)
def test_labels_that_do_not_fit_are_refused(model: Any, labels: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model(torch.tensor([[1, 2, 3]]), labels=labels)


def test_holes_in_a_row_are_neither_read_nor_scored(model: Any, fast: Any) -> None:
    ids = ids_of(fast, "the and then")
    mask = torch.ones(1, 15, dtype=torch.int64)
    mask[0, [0, 4, 9]] = 0
    holed = torch.full((1, 15), 120)
    holed[mask.bool()] = ids[0]
    whole, read = model(ids, labels=ids), model(holed, attention_mask=mask, labels=holed)
    close(read.logits[mask.bool()], whole.logits[0])
    close(read.logits[0, 4], read.logits[0, 3])
    close(read.loss, whole.loss)


# Empty texts


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_empty_text_is_refused_alone_and_in_a_batch(model: Any, fast: Any, side: str) -> None:
    batch = fast(["the", "", "then"], padding=True, padding_side=side, return_tensors="pt")
    for call in (model, lambda *args, **options: greedy(model, *args, **options)):
        with pytest.raises(ValueError, match="row 1 has no token, only padding: an empty text predicts nothing"):
            call(**batch)
        with pytest.raises(ValueError, match="empty text predicts nothing"):
            call(torch.zeros(2, 0, dtype=torch.int64))
    for nothing in ({}, {"input_ids": torch.zeros(0, 3, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=r"either input_ids or inputs_embeds|no token to read"):
            model(**nothing)


# Tokens


def test_a_token_of_another_model_is_refused(model: Any) -> None:
    for wrong in (257, -1):
        with pytest.raises(ValueError, match=f"input_ids has {wrong}; the model's tokens are 0 to 255"):
            model(torch.tensor([[1, wrong, 2]]))


def test_a_padding_token_of_the_model_s_own_is_text_without_a_mask(model: Any) -> None:
    """Scripts set it to a token of the text: only the mask can then say what is padding."""
    ids = torch.tensor([[1, 10, 10, 3]])
    whole = model(ids).logits
    model.generation_config.pad_token_id = 10
    close(model(ids).logits, whole)
    masked = model(ids, attention_mask=torch.tensor([[1, 0, 0, 1]])).logits
    close(masked[:, -1], model(torch.tensor([[1, 3]])).logits[:, -1])


def test_the_character_that_the_alphabet_lacks_is_named(tmp_path: Path) -> None:
    _, fast = exported(made(CharacterTokenizer("abc ")), tmp_path / "characters")
    from transformers import AutoTokenizer

    trusted = AutoTokenizer.from_pretrained(tmp_path / "characters", trust_remote_code=True)
    trusted.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert fast("abc").input_ids == trusted("abc").input_ids == again("abc").input_ids
    for text in ("abçd", ["a", "bç"]):
        with pytest.raises(ValueError, match="the character 'ç' is not in the model's alphabet"):
            trusted(text)
    with pytest.raises(Exception, match="Missing"):
        fast("abç")


# The state as a cache


def test_a_loop_of_one_s_own_is_generate(model: Any, fast: Any) -> None:
    from mmrec.export.hf import StateCache

    ids = ids_of(fast, PROMPTS[0])
    expected = greedy(model, ids)[0].tolist()
    for cache in (None, StateCache()):
        part, written, reached = ids, [], cache
        for _ in range(12):
            output = model(part, past_key_values=reached, use_cache=True)
            assert cache is None or output.past_key_values is cache
            reached, part = output.past_key_values, output.logits[:, -1:].argmax(-1)
            written.append(int(part))
        assert written == expected


def test_caches_of_keys_and_values_are_refused(model: Any) -> None:
    from transformers import DynamicCache, StaticCache

    ids = torch.tensor([[1, 2, 3]])
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=9), (), ((1, 2),)):
        with pytest.raises(TypeError, match=f"past_key_values is a {type(cache).__name__}"):
            model(ids, past_key_values=cache)
    with pytest.raises(TypeError, match="DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)


def test_a_prompt_is_read_once_for_many_continuations(model: Any, fast: Any) -> None:
    from mmrec.export.hf import StateCache

    prefix, ends = ids_of(fast, PROMPTS[0]), [ids_of(fast, end) for end in ("a", "bcd")]
    kept = StateCache()
    model(prefix, past_key_values=kept)
    for end in ends:
        whole = torch.cat([prefix, end], dim=1)
        cache = copy.deepcopy(kept)
        assert greedy(model, whole, past_key_values=cache).tolist() == greedy(model, whole).tolist()
        assert cache.get_seq_length() == whole.shape[1] + 11
        close(model(end, past_key_values=copy.deepcopy(kept)).logits, model(whole).logits[:, prefix.shape[1] :])
    before = [part.clone() for layer in kept.state or [] for part in layer]
    assert model(ends[0], past_key_values=kept, use_cache=False).past_key_values is None
    assert all(map(torch.equal, before, (part for layer in kept.state or [] for part in layer)))


def test_a_cache_of_other_rows_is_refused_and_can_be_repeated(model: Any, fast: Any) -> None:
    from mmrec.export.hf import StateCache

    cache, ids = StateCache(), ids_of(fast, PROMPTS[0])
    model(ids, past_key_values=cache)
    more = torch.tensor([[1], [2], [1]])
    with pytest.raises(ValueError, match="past_key_values has 1 rows and the input 3"):
        model(more, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    logits = model(more, past_key_values=cache).logits
    close(logits[0], logits[2])
    close(logits[1, 0], model(torch.cat([ids, more[1:2]], dim=1)).logits[0, -1])
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.rows == 1
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(3)
    cache.reset()
    close(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0, 1, 5])
def test_a_conversation_in_padded_turns_is_each_text_alone(model: Any, fast: Any, side: str, keep: int) -> None:
    from mmrec.export.hf import StateCache

    turns = [["the the", "e", "Iğ"], ["", "and then", "a"], ["t", "", "ılık"]]
    cache, texts = StateCache(), [""] * 3
    for turn in turns:
        texts = [text + more for text, more in zip(texts, turn, strict=True)]
        batch = fast(turn, padding=True, padding_side=side, return_tensors="pt")
        output = model(**batch, past_key_values=cache, logits_to_keep=keep)
        for row, text in enumerate(texts):
            alone = model(ids_of(fast, text))
            close(output.logits[row, -1], alone.logits[0, -1])
            for mine, theirs in zip(cache.state or [], alone.past_key_values.state, strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    close(a[row : row + 1], b)


def test_long_padded_prompts_take_constant_memory(tmp_path: Path, exports: tuple[LoadedModel, Any, Any]) -> None:
    """Two prompts of 40,000 and 39,999 tokens, against two of 4,000: not ten times the memory, but hardly more."""
    program = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
def read(length):
    ids = torch.randint(256, (2, length))
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with torch.no_grad():
        output = model(ids, attention_mask=mask, logits_to_keep=1)
        output = model(ids, attention_mask=mask, logits_to_keep=1, past_key_values=output.past_key_values)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
short = read(4000)
print((read(40_000) - short) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_chunks_of_any_length_give_the_same(
    model: Any, fast: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.double()  # the order of float32 sums depends on the chunks
    batch = fast([prompt * 3 for prompt in PROMPTS], padding=True, return_tensors="pt")
    whole = model(**batch, output_hidden_states=True)
    on = model(**batch, past_key_values=copy.deepcopy(whole.past_key_values))
    monkeypatch.setattr("mmrec.export.hf.padding.READ_CHUNK", chunk)
    parts = model(**batch, output_hidden_states=True)
    for one, other in zip((whole.logits, *whole.hidden_states), (parts.logits, *parts.hidden_states), strict=True):
        close(one, other)
    close(on.logits, model(**batch, past_key_values=parts.past_key_values).logits)
    for keep in (1, 7):
        close(model(**batch, logits_to_keep=keep).logits, whole.logits[:, -keep:])


# Embeddings, hidden states, attention


def test_embeddings_in_the_place_of_tokens(model: Any, fast: Any) -> None:
    batch = fast(PROMPTS, padding=True, return_tensors="pt")
    vectors = model.get_input_embeddings()(batch.input_ids.masked_fill(batch.attention_mask == 0, 0))
    read = model(inputs_embeds=vectors, attention_mask=batch.attention_mask)
    close(read.logits, model(**batch).logits)
    written = greedy(model, inputs_embeds=vectors, attention_mask=batch.attention_mask)
    assert written.tolist() == greedy(model, **batch).tolist()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(batch.input_ids, inputs_embeds=vectors)
    with pytest.raises(ValueError, match=r"inputs_embeds is \[1, 3, 5\]"):
        model(inputs_embeds=torch.zeros(1, 3, 5))


def test_hidden_states_are_those_of_the_blocks(model: Any, fast: Any) -> None:
    batch = fast(PROMPTS, padding=True, return_tensors="pt")
    output = model(**batch, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (*batch.input_ids.shape, model.config.hidden_size) for x in output.hidden_states)
    close(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    alone = model(ids_of(fast, PROMPTS[1]), output_hidden_states=True, logits_to_keep=1)
    assert alone.logits.shape[1] == 1
    for here, there in zip(output.hidden_states, alone.hidden_states, strict=True):
        close(here[1][batch.attention_mask[1].bool()], there[0])
    close(alone.hidden_states[0], model.get_input_embeddings()(ids_of(fast, PROMPTS[1])))
    assert model(**batch).hidden_states is None
    loss, logits, cache, hidden = model(**batch, labels=batch.input_ids, output_hidden_states=True, return_dict=False)
    assert (loss.dim(), logits.dim(), cache.rows, len(hidden)) == (0, 3, 4, 3)
    said = model.generate(
        **batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    assert [states[-1].shape[1] for states in said.hidden_states] == [batch.input_ids.shape[1], 1, 1]


def test_what_the_model_does_not_have_is_refused(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for options, says in (
        ({"output_attentions": True}, "no attention"),
        ({"token_type_ids": torch.tensor([[0, 1, 1]])}, "token_type_ids"),
        ({"encoder_outputs": (ids,)}, "encoder_outputs"),
        ({"position_ids": torch.tensor([0, 1, 2])}, "position_ids is"),
    ):
        with pytest.raises(ValueError, match=says):
            model(ids, **options)
    with pytest.raises(ValueError, match="input_ids is"):
        model(ids[0])
    close(model(ids, token_type_ids=torch.zeros_like(ids)).logits, model(ids).logits)


def test_the_config_s_own_options_hold(model: Any) -> None:
    ids = torch.tensor([[1, 2, 3]])
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    model.config.use_cache = False
    assert model(ids).past_key_values is None
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


# Packed texts


def test_texts_packed_into_a_row_are_read_each_alone(model: Any, fast: Any) -> None:
    """As the library's collator without padding packs them: positions that begin anew."""
    from transformers import DataCollatorWithFlattening

    texts = [{"input_ids": ids_of(fast, prompt)[0].tolist()} for prompt in PROMPTS]
    batch = dict(DataCollatorWithFlattening(return_tensors="pt")(texts))
    packed = model(**batch)
    at, total, count = 0, 0.0, 0
    for prompt in PROMPTS:
        ids = ids_of(fast, prompt)
        alone = model(ids, labels=ids)
        close(packed.logits[:, at : at + ids.shape[1]], alone.logits)
        at += ids.shape[1]
        total, count = total + float(alone.loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert float(packed.loss) == pytest.approx(total / count, rel=1e-5)


# generate, and the pipeline


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_of_a_padded_batch_are_those_of_each_text(model: Any, fast: Any, side: str) -> None:
    batch = fast(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
    together = greedy(model, **batch, num_beams=3, num_return_sequences=2)
    for row, prompt in enumerate(PROMPTS):
        alone = greedy(model, ids_of(fast, prompt), num_beams=3, num_return_sequences=2)
        assert together[2 * row : 2 * row + 2].tolist() == alone.tolist()


def test_several_sequences_of_one_prompt(model: Any, fast: Any) -> None:
    torch.manual_seed(0)
    written = model.generate(ids_of(fast, "the"), max_new_tokens=8, do_sample=True, num_return_sequences=5)
    assert written.shape == (5, 11)
    assert len({tuple(row) for row in written.tolist()}) > 1
    for row in written:
        scores = model(row[None]).logits
        close(scores[0, :3], model(ids_of(fast, "the")).logits[0])


def test_assistants_are_refused(model: Any, fast: Any) -> None:
    ids = ids_of(fast, "the")
    for options in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            model.generate(ids, max_new_tokens=4, **options)


def test_a_prompt_read_in_the_library_s_chunks(model: Any, fast: Any) -> None:
    from mmrec.export.hf import StateCache

    batch = fast(PROMPTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="prefill chunking without a cache"):
        greedy(model, **batch, prefill_chunk_size=4)
    chunked = greedy(model, **batch, prefill_chunk_size=4, past_key_values=StateCache())
    assert chunked.tolist() == greedy(model, **batch).tolist()


def test_the_pipeline(model: Any, fast: Any) -> None:
    from transformers import pipeline

    writer = pipeline("text-generation", model=model, tokenizer=fast)
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    alone = [writer(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
    together = [one[0]["generated_text"] for one in writer(PROMPTS, batch_size=4, **options)]
    assert together == alone
    with pytest.raises(ValueError, match=r"empty text|bos_token_id"):
        writer("", **options)


@pytest.mark.slow
def test_the_library_s_trainer_trains_evaluates_and_resumes(model: Any, fast: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

    texts = [fast(prompt) for prompt in PROMPTS * 3]
    fast.padding_side = "right"

    def vocabulary(scored: Any) -> dict[str, float]:
        return {"vocabulary": float(scored.predictions.shape[-1])}

    def trainer(epochs: int, accumulate: int = 2) -> Any:
        options = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            num_train_epochs=epochs,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            eval_strategy="epoch",
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(fast, mlm=False)
        return Trainer(
            model,
            options,
            train_dataset=texts,
            eval_dataset=texts,
            data_collator=collator,
            compute_metrics=vocabulary,
        )

    with torch.enable_grad():
        before = trainer(1).evaluate()["eval_loss"]
        trainer(2).train()
        resumed = trainer(4)
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    after = resumed.evaluate()
    assert after["eval_loss"] < before
    assert after["eval_vocabulary"] == 256
    assert resumed.predict(texts).predictions.shape == (12, max(len(text.input_ids) for text in texts), 256)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-12", trust_remote_code=True)
    ids = ids_of(fast, "the")
    assert torch.equal(saved(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_larger_vocabulary_is_saved_and_loaded(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = made(ByteTokenizer(), ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, tie_embeddings=tied))
    model, fast = exported(trained, tmp_path / "out")
    batch = fast(PROMPTS, padding=True, return_tensors="pt")
    before, loss = model(**batch).logits, model(**batch, labels=batch.input_ids).loss
    model.resize_token_embeddings(len(fast), mean_resizing=False)
    assert model.config.vocab_size == len(fast) == 257
    after = model(**batch)
    close(after.logits[..., :256], before)
    model.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(**batch).logits, after.logits)
    assert (again.net.head.weight is again.net.embedding.weight) == tied
    # The padding token is now one of the model's: the mask still says what is padding.
    more = float(model(**batch, labels=batch.input_ids).loss)
    assert more == pytest.approx(float(loss), abs=0.2)
    assert float(model(ids_of(fast, "the")).logits.std()) > 0


def test_in_float64_the_state_is_too(model: Any) -> None:
    ids = torch.arange(40)[None]
    double = copy.deepcopy(model).double()
    state = double(ids).past_key_values.state
    assert all(part.dtype == torch.float64 for layer in state for part in layer)
    with torch.no_grad():
        expected, _ = double.net(ids, double.net.zero_state(1))
    assert torch.equal(double(ids).logits, expected)


def test_a_folder_of_the_first_version_loads(tmp_path: Path, exports: tuple[LoadedModel, Any, Any]) -> None:
    """Its config calls the architecture a shape."""
    from transformers import AutoModelForCausalLM

    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"architecture"', '"shape"'))
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    ids = torch.arange(9)[None]
    assert torch.equal(old(ids).logits, exports[1](ids).logits)


def test_a_layer_whose_code_does_not_travel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_TYPES, "yours", LAYER_TYPES["short"])
    trained = made(ByteTokenizer(), ModelConfig(dim=16, layers=1, layer_types=("yours",), heads=2))
    with pytest.raises(UserError, match="the model has yours layers; only short, long, portable are exported"):
        saving.save(tmp_path, trained)
    assert not list(tmp_path.iterdir())
