"""An exported folder without mmrec: the code that travels with it is mmrec's, in one file, and does the same."""

# ruff: noqa: RUF001 -- the dotless letter is a letter

from __future__ import annotations

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_exports import exported, folders
from isolated import link_packages, run_isolated
from models import made
from test_export_hf import ours

from mmrec.export import hf
from mmrec.export.hf.bundle import bundled_code
from mmrec.model import ModelConfig
from mmrec.tokenizers import ByteTokenizer

__all__ = ["folders"]  # a fixture that every test here takes

CONFIG = ModelConfig(dim=16, layers=3, layer_types=("short", "long", "portable"), heads=2, ffn_dim=24)


def test_the_code_needs_torch_and_transformers_alone() -> None:
    tree = ast.parse(bundled_code())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} - sys.stdlib_module_names == {"torch", "transformers"}


def test_it_computes_what_the_package_computes(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    trained = made(ByteTokenizer(), CONFIG)
    model, fast = exported(trained, tmp_path / "out")
    alone: Any = get_class_from_dynamic_module("modeling_mmrec.MmrecForCausalLM", str(tmp_path / "out"))
    assert alone is not type(model)
    other = alone.from_pretrained(tmp_path / "out")
    batch = fast(["the the the, then", "ere", "Iğdır"] * 2, padding=True, return_tensors="pt")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    losses = [one(**batch, labels=labels).loss for one in (model, other)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    ids = torch.arange(40)[None]
    packed = torch.arange(40)[None] % 13
    with torch.no_grad():
        assert torch.equal(model(ids, position_ids=packed).logits, other(ids, position_ids=packed).logits)
        read = model(ids)
        on = other(ids, past_key_values=hf.StateCache())  # of the package: the same states
        assert torch.equal(read.logits, on.logits)
        whole = model(torch.cat([ids, ids], dim=1)).logits[:, 40:]
        torch.testing.assert_close(other(ids, past_key_values=read.past_key_values).logits, whole, atol=1e-3, rtol=0)


PROGRAM = """
import importlib.util, json, sys

assert importlib.util.find_spec("mmrec") is importlib.util.find_spec("lightning") is None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

fast = AutoTokenizer.from_pretrained("out", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
prompt = fast("ılık", return_tensors="pt")
found = {"written": model.generate(**prompt, max_new_tokens=9, do_sample=False)[0].tolist()}
with torch.no_grad():
    found["logits"] = model(**prompt).logits[0].tolist()

def train(model, rate=1e-2):
    options = TrainingArguments(output_dir="run", num_train_epochs=2, learning_rate=rate, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4)
    texts = [fast(text) for text in ("the the the", "ılık", "and then") * 4]
    fast.padding_side = "right"
    trainer = Trainer(model, options, train_dataset=texts, eval_dataset=texts,
        data_collator=DataCollatorForLanguageModeling(fast, mlm=False))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return [before, trainer.evaluate()["eval_loss"]]

if sys.argv[1] == "peft":
    from peft import LoraConfig, PeftModel, get_peft_model

    base = {name: value.clone() for name, value in model.state_dict().items()}
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["project", "output"], task_type="CAUSAL_LM"))
    found["lora"] = train(lora, 5e-2)
    learned = lora.eval()(**prompt).logits
    lora.save_pretrained("adapter")
    again = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
    assert all(torch.equal(value, base[name]) for name, value in again.state_dict().items())
    again = PeftModel.from_pretrained(again, "adapter").eval()
    assert torch.allclose(again(**prompt).logits, learned, atol=1e-4), (again(**prompt).logits - learned).abs().max()
    merged = again.merge_and_unload()
    assert torch.allclose(merged(**prompt).logits, learned, atol=1e-4)
    assert not any("lora" in name for name in merged.state_dict())
    model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
found["trained"] = train(model)
model.save_pretrained("again")
fast.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
weights = again.state_dict()
assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
# Products may differ in the last digit by where a weight lies in memory.
assert torch.allclose(again(**prompt).logits, model.eval()(**prompt).logits, atol=1e-5)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_folder_runs_where_mmrec_is_not(tmp_path: Path) -> None:
    """Generation, the library's Trainer, LoRA of PEFT, and a folder that is saved and loaded again.

    An interpreter that finds torch, transformers, what Trainer needs (accelerate), PEFT and what they require alone.
    """
    trained = made(ByteTokenizer(), CONFIG)
    hf.save(tmp_path / "out", trained)
    others = ["peft"] if find_spec("peft") else []
    link_packages(tmp_path / "packages", "torch", "transformers", "accelerate", *others)
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    done = run_isolated(PROGRAM, tmp_path / "packages", *(others or ["without"]), cwd=tmp_path, **own)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    prompt = torch.tensor(list("ılık".encode()))
    assert found["written"] == prompt.tolist() + ours(trained, prompt, 9)
    with torch.no_grad():
        expected, _ = trained.net(prompt[None], trained.net.zero_state(1))
    # Kernels of mmrec in C, where there are any, round otherwise.
    torch.testing.assert_close(torch.tensor(found["logits"]), expected[0], atol=1e-4, rtol=0)
    for before, after in (found["trained"], found.get("lora", (1, 0))):
        assert after < before
    assert (tmp_path / "again" / "modeling_mmrec.py").read_text(encoding="utf-8") == bundled_code()
