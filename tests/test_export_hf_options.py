"""Every option by which programs call a causal model of transformers: the right result, or one clear error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import PROMPTS, close, exported, exports, fast, folders, greedy, ids_of, model, no_gradients
from models import made
from torch import Tensor

from mmrec.checkpoints.loading import LoadedModel
from mmrec.core.errors import UserError
from mmrec.export.hf import saving
from mmrec.model import LAYER_TYPES, ModelConfig
from mmrec.tokenizers import ByteTokenizer, CharacterTokenizer

__all__ = ["exports", "fast", "folders", "model", "no_gradients"]  # fixtures


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
