"""The state as the cache of a causal model of transformers: read once, in parts, in padded turns."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from hf_exports import PROMPTS, close, exports, fast, folders, greedy, ids_of, model, no_gradients

from mmrec.checkpoints.loading import LoadedModel

__all__ = ["exports", "fast", "folders", "model", "no_gradients"]  # fixtures


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
