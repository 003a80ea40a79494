"""Train a small model on a text of your own, from Python, and let it write.

    python examples/train_on_your_text.py novel.txt --output novel.ckpt

Without a file the text is the help that comes with Python. From the command line, and with checkpoints as it goes,
this is ``mmrec prepare --input_file novel.txt`` and ``mmrec fit``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from mmrec import MemoryLM
from mmrec.data.options import PrepareOptions
from mmrec.data.prepare import prepare
from mmrec.model import ModelConfig
from mmrec.training.datamodule import TextDataModule
from mmrec.training.module import RecurrentLMModule


def train(text: Path | None, output: Path, tokens: Path, updates: int) -> MemoryLM:
    """Train on ``text`` and return the model.

    Args:
        text: a text file; the help texts of Python if None.
        output: the checkpoint to write.
        tokens: the folder of tokens to write.
        updates: steps of the optimizer.
    """
    # 1. From text to tokens: "characters" for a text with few different ones, "bytes" for any, "bpe" for a long one.
    if text is None:
        prepare(PrepareOptions("sample", output_dir=tokens))
    else:
        prepare(PrepareOptions(input_file=text, output_dir=tokens, tokenizer="bytes"))

    # 2. The data: 8 rows, each of which reads 128 tokens a batch, with its state carried from batch to batch.
    data = TextDataModule(data_dir=str(tokens), batch_size=8, seq_len=128)

    # 3. The model. The tokenizer is that of the data, and is kept in the checkpoint.
    seed_everything(0, verbose=False)
    config = ModelConfig(dim=64, layers=3, heads=2, ffn_dim=128)
    module = RecurrentLMModule(config, tokenizer=data.tokenizer, warmup_steps=10)
    print(f"{module.net.parameter_count():,} parameters; the state of a text is {module.net.state_size():,} numbers")

    # 4. Lightning's own Trainer: loggers, callbacks, devices and strategies are what they are there.
    trainer = Trainer(
        max_steps=updates,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    (scores,) = trainer.validate(module, datamodule=data, verbose=False)
    print(f"validation: {scores['val/loss']:.3f} nats/token after {updates} updates")
    trainer.save_checkpoint(output)
    return MemoryLM.load(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text file; Python's own help if left out")
    parser.add_argument("--output", type=Path, default=Path("example.ckpt"), help="checkpoint; %(default)s")
    parser.add_argument("--tokens", type=Path, default=Path("data/example"), help="folder of tokens; %(default)s")
    parser.add_argument("--updates", type=int, default=150, help="steps of the optimizer; %(default)s")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # hints on workers that mapped tokens do not need
    model = train(given.text, given.output, given.tokens, given.updates)
    print(model.generate("The ", length=200, temperature=0.7, seed=1))


if __name__ == "__main__":
    main()
