"""The model in transformers: logits, state and text are ours; padding never reaches the state."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import exported, folders
from models import SHAPE, TEXT, TOKENIZERS, made
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.inference.generate import generate_tokens
from mmrec.inference.sampling import SamplingOptions
from mmrec.model import ModelConfig
from mmrec.tokenizers import ByteTokenizer, Tokenizer

__all__ = ["folders"]  # a fixture that every test here takes

PROMPT = "Iğdır the"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture(params=[SHAPE, replace(SHAPE, count_half_lives=(20, 300))], ids=["", "counts"])
def bytewise(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LoadedModel, Any, Any]:
    trained = made(ByteTokenizer(), request.param)
    return trained, *exported(trained, tmp_path / "out")


def ours(trained: LoadedModel, tokens: Tensor, length: int) -> list[int]:
    return list(generate_tokens(trained.net, tokens, SamplingOptions(length, temperature=0)))


def test_tokens_logits_and_text_are_ours(tokenizer: Tokenizer, tmp_path: Path) -> None:
    trained = made(tokenizer)
    model, fast = exported(trained, tmp_path / "out")
    ids = fast(TEXT, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(TEXT).tolist()
    assert fast.decode(ids[0], skip_special_tokens=True) == TEXT
    with torch.no_grad():
        expected, _ = trained.net(ids, trained.net.zero_state(1))
        torch.testing.assert_close(model(ids).logits, expected)
    written = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    assert written.tolist() == ours(trained, ids[0], 60)


def test_the_prompt_is_read_once_and_then_one_token_at_a_time(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    read: list[int] = []
    model.net.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    ids = fast(PROMPT, return_tensors="pt").input_ids
    model.generate(ids, max_new_tokens=20, do_sample=False)
    assert read == [ids.shape[1], *[1] * 19]


def test_without_the_cache_the_text_is_the_same(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    ids = fast(PROMPT, return_tensors="pt").input_ids
    written = [model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=use) for use in (True, False)]
    assert written[0].tolist() == written[1].tolist()
    assert model(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_reaches_the_state(bytewise: tuple[LoadedModel, Any, Any], side: str) -> None:
    _, model, fast = bytewise
    prompts = ["the the the, then", "e", "Iğdır"]
    batch = fast(prompts, padding=True, padding_side=side, return_tensors="pt")
    with torch.no_grad():
        for mask in (batch.attention_mask, None):  # the padding token is known without it
            together = model(batch.input_ids, attention_mask=mask)
            for row, prompt in enumerate(prompts):
                alone = model(fast(prompt, return_tensors="pt").input_ids)
                here = together.logits[row][batch.attention_mask[row].bool()]
                torch.testing.assert_close(here, alone.logits[0], atol=1e-5, rtol=1e-4)
                for mine, theirs in zip(together.past_key_values.state, alone.past_key_values.state, strict=True):
                    for a, b in zip(mine, theirs, strict=True):
                        torch.testing.assert_close(a[row : row + 1], b, atol=1e-5, rtol=1e-4)
    written = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, -12:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(fast(prompt, return_tensors="pt").input_ids, max_new_tokens=12, do_sample=False)
        assert written[row].tolist() == alone[0, -12:].tolist()


def test_what_follows_is_read_on_also_with_padding(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    first, second = "the first", ["and then", "e"]
    with torch.no_grad():
        read = model(fast([first, first], return_tensors="pt").input_ids)
        batch = fast(second, padding=True, return_tensors="pt")
        after = model(**batch, past_key_values=read.past_key_values)
        assert after.past_key_values.get_seq_length() == len(first) + batch.input_ids.shape[1]
        for row, text in enumerate(second):
            alone = model(fast(first + text, return_tensors="pt").input_ids).logits[0, -1]
            torch.testing.assert_close(after.logits[row, -1], alone, atol=1e-5, rtol=1e-4)


def test_rows_that_have_ended_do_not_disturb_the_others(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    batch = fast(["the the", "ılık"], padding=True, return_tensors="pt")
    free = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, -20:]
    end = int(free[0, 2])
    stopped = model.generate(**batch, max_new_tokens=20, do_sample=False, eos_token_id=end)
    stopped = stopped[:, batch.input_ids.shape[1] :]
    for row in range(2):
        whole = free[row].tolist()
        kept = whole[: whole.index(end) + 1] if end in whole else whole
        assert stopped[row, : len(kept)].tolist() == kept
        assert set(stopped[row, len(kept) :].tolist()) <= {fast.pad_token_id}


def test_beam_search_finds_what_rescoring_confirms(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    ids = fast(PROMPT, return_tensors="pt").input_ids
    options: dict[str, Any] = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    beams = model.generate(ids, num_beams=4, num_return_sequences=2, do_sample=False, length_penalty=0.0, **options)
    for row, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        with torch.no_grad():
            chances = model(row[None, :-1]).logits[0].log_softmax(-1)[ids.shape[1] - 1 :]
        total = chances.gather(1, row[ids.shape[1] :, None]).sum()
        torch.testing.assert_close(score, total, atol=1e-4, rtol=1e-4)


def test_sampling_is_reproducible(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    ids = fast(PROMPT, return_tensors="pt").input_ids
    written = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        written.append(model.generate(ids, max_new_tokens=30, do_sample=True, top_p=0.99).tolist())
    assert written[0] == written[1] != written[2]


def test_it_learns(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, fast = bytewise
    ids = fast(["the the the the", "ılık"], padding=True, return_tensors="pt")
    labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        output = model(**ids, labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]


def test_only_the_logits_that_are_asked_for(
    bytewise: tuple[LoadedModel, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, _ = bytewise
    ids = torch.arange(50)[None]
    with torch.no_grad():
        whole = model(ids)
        monkeypatch.setattr("mmrec.export.hf.padding.READ_CHUNK", 16)
        torch.testing.assert_close(model(ids).logits, whole.logits, atol=1e-5, rtol=1e-4)
        for keep in (1, 20):
            torch.testing.assert_close(
                model(ids, logits_to_keep=keep).logits, whole.logits[:, -keep:], atol=1e-5, rtol=1e-4
            )
        some = model(ids, logits_to_keep=torch.tensor([3, 7])).logits
        torch.testing.assert_close(some, whole.logits[:, [3, 7]], atol=1e-5, rtol=1e-4)
        logits, cache = model(ids, return_dict=False)
        assert logits.shape == (1, 50, 256)
        assert cache.get_seq_length() == 50


def test_a_mask_of_another_form_is_refused(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    _, model, _ = bytewise
    ids = torch.tensor([[1, 2, 3]])
    for mask in (torch.ones(1, 1, 3, 3), torch.ones(1, 2), torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="attention_mask is"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="other values than 0, for padding, and 1"):
        model(ids, attention_mask=torch.tensor([[float("-inf"), 0.0, 0.0]]))  # one that is added to attention
    whole = model(ids, attention_mask=torch.tensor([[0, 1, 1]])).logits
    for kind in (torch.bool, torch.float32):
        assert torch.equal(model(ids, attention_mask=torch.tensor([[0, 1, 1]]).to(kind)).logits, whole)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_again_and_loaded_again(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = made(ByteTokenizer(), ModelConfig(dim=16, layers=2, heads=2, ffn_dim=24, tie_embeddings=tied))
    model, fast = exported(trained, tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    fast.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert (again.net.head.weight is again.net.embedding.weight) == tied
    ids = AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT, return_tensors="pt").input_ids
    assert torch.equal(again(ids).logits, model(ids).logits)
    for name in ("config.json", "modeling_mmrec.py", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_a_new_model_of_the_config_is_initialized_as_ours(bytewise: tuple[LoadedModel, Any, Any]) -> None:
    from mmrec.export.hf import MmrecConfig, MmrecForCausalLM
    from mmrec.model import RecurrentLM

    torch.manual_seed(3)
    theirs = MmrecForCausalLM(MmrecConfig(256, SHAPE.as_dict()))
    torch.manual_seed(3)
    for mine, other in zip(RecurrentLM(SHAPE, 256).parameters(), theirs.net.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_in_bfloat16_the_state_stays_exact(bytewise: tuple[LoadedModel, Any, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, model, _ = bytewise
    coarse: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16)
    ids = torch.arange(40)[None]
    read = coarse(ids)
    assert all(part.dtype == torch.float32 for layer in read.past_key_values.state for part in layer)
    apart = (read.logits.float().softmax(-1) - model(ids).logits.softmax(-1)).abs().sum(-1).mean()
    assert apart < 0.1
    assert coarse.generate(ids, max_new_tokens=4).shape == (1, 44)
