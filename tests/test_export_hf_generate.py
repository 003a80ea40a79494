"""What transformers does with a causal model: generate, its pipeline, its trainer, a larger vocabulary."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import PROMPTS, close, exported, exports, fast, folders, greedy, ids_of, model, no_gradients
from models import made

from mmrec.model import ModelConfig
from mmrec.tokenizers import ByteTokenizer

__all__ = ["exports", "fast", "folders", "model", "no_gradients"]  # fixtures


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
