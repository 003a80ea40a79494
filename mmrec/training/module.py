"""The LightningModule: the loss, the carried memory, and what is written into a checkpoint."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, distributed
from torch.optim.lr_scheduler import LambdaLR

from mmrec.checkpoints import checkpoint as checkpoints
from mmrec.core.errors import UserError
from mmrec.data.batches import IGNORE_INDEX, Batch
from mmrec.inference.metrics import TextMetrics, token_nll
from mmrec.model import ModelConfig, RecurrentLM, State, detach_state, reset_state_rows
from mmrec.tokenizers import Tokenizer, token_lengths
from mmrec.training.dynamic import DynamicEvaluation
from mmrec.training.losses import confidence, confidence_weight
from mmrec.training.mtp import MTPHead, mtp_targets, mtp_weight
from mmrec.training.optim import make_optimizer, warmup_cosine
from mmrec.training.strategy import shard


class RecurrentLMModule(LightningModule):
    """Trains a :class:`mmrec.model.RecurrentLM` with the memory carried from batch to batch.

    Args:
        config: the architecture of the model.
        tokenizer: the tokenizer of the data, from which it is filled in; kept in every checkpoint.
        dropout: share of activations dropped in training.
        optimizer: "muon" (with AdamW for all that is not a layer's matrix) or "adamw".
        learning_rate: the highest rate, reached at the end of the warm-up.
        weight_decay: of matrices and embeddings, relative to the learning rate.
        beta1: AdamW's average of the gradient.
        beta2: AdamW's average of the squared gradient.
        warmup_steps: updates over which the rate rises linearly.
        min_lr_ratio: share of the rate that is left at the end of the cosine; a run without a number of steps or
            epochs keeps all of it.
        mtp_loss_weight: weight of the loss on the token after the next (multi-token prediction), as a share of the
            next one's; it fades to 0 until the end of a run with a number of steps or epochs. 0 leaves it out.
        confidence_penalty: share of the predictions' entropy that is taken off the loss in training, so that a small
            text known by heart does not make them too sure; it rises from 0 until the end of a run with a number of
            steps or epochs. 0 leaves it out.
        reset_at_documents: forget all at the start of each document, where the text is cut into such; else the
            memory is carried on from one to the next.
    """

    def __init__(
        self,
        config: ModelConfig = ModelConfig(),  # noqa: B008 -- immutable
        tokenizer: Tokenizer | None = None,
        dropout: float = 0.0,
        optimizer: Literal["muon", "adamw"] = "muon",
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.05,
        mtp_loss_weight: float = 0.0,
        confidence_penalty: float = 0.0,
        reset_at_documents: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise UserError("the model has no tokenizer; it comes from the data")
        _check_range("dropout", dropout, 0, 1)
        _check_range("beta1", beta1, 0, 1)
        _check_range("beta2", beta2, 0, 1)
        _check_range("learning_rate", learning_rate, 0, float("inf"))
        _check_range("weight_decay", weight_decay, 0, float("inf"))
        _check_range("warmup_steps", warmup_steps, 0, float("inf"))
        _check_range("mtp_loss_weight", mtp_loss_weight, 0, float("inf"))
        _check_range("confidence_penalty", confidence_penalty, 0, 1)
        if not 0 <= min_lr_ratio <= 1:
            raise UserError(f"model.min_lr_ratio is {min_lr_ratio}; it must lie in 0..1")
        if reset_at_documents and tokenizer.separator is None:
            raise UserError("model.reset_at_documents needs text that is cut into documents, as a large corpus is")
        self.tokenizer = tokenizer
        self.reset_at_documents = reset_at_documents
        self.net = RecurrentLM(config, self.tokenizer.vocab_size, dropout)
        self.mtp_head = MTPHead(config.dim) if mtp_loss_weight else None
        self.mtp_loss_weight = mtp_loss_weight
        self.confidence_penalty = confidence_penalty
        self.dropout = dropout
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (beta1, beta2)
        self.warmup_steps = warmup_steps
        self.min_lr_ratio = min_lr_ratio
        self.score = TextMetrics()
        self.score.persistent(False)
        lengths = torch.from_numpy(token_lengths(self.tokenizer))
        self.token_lengths: Tensor
        self.register_buffer("token_lengths", lengths, persistent=False)
        self._is_sharded = False
        self._carried: dict[int, State] = {}
        """What each group of rows has read."""
        self._random: dict[str, Tensor] = {}
        self._dynamic: DynamicEvaluation | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a part of each weight."""
        return self._is_sharded

    def configure_model(self) -> None:
        """Cut the model over the processes, where the strategy is to do so."""
        if self.device_mesh is not None and not self._is_sharded:
            shard(self.net, self.mtp_head, self.device_mesh["data_parallel"])
            self._is_sharded = True

    # Training

    def on_train_start(self) -> None:
        """Restore the random numbers of a resumed run last, after all that draws some while it is set up."""
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"].cpu())
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"].cpu())
        self._random = {}
        self._apply_rates()

    def _apply_rates(self) -> None:
        """Make rates, decays and betas those asked for now: a resumed optimizer brings those it was saved with."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [self.learning_rate] * len(scheduler.base_lrs)
        groups = zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, self._weight_decays, strict=True)
        for group, share, weight_decay in groups:
            group["initial_lr"] = self.learning_rate
            group["lr"] = self.learning_rate * share(scheduler.last_epoch)
            group["weight_decay"] = weight_decay
            if "betas" in group:
                group["betas"] = self.betas

    def hyperparameters(self) -> dict[str, Any]:
        """Return what is compared when a run is resumed, and shown in TensorBoard's table of runs."""
        return {
            "dropout": self.dropout,
            "optimizer": self.optimizer,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "beta1": self.betas[0],
            "beta2": self.betas[1],
            "warmup_steps": self.warmup_steps,
            "min_lr_ratio": self.min_lr_ratio,
            "mtp_loss_weight": self.mtp_loss_weight,
            "confidence_penalty": self.confidence_penalty,
            "reset_at_documents": self.reset_at_documents,
            "parameters": self.net.parameter_count(),
        }

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Read one batch on from the carried memory and return the objective that is minimized.

        It is the loss, in nats/token, which is logged, and where they are on the confidence penalty and the weighted
        loss on the second token, which are not.
        """
        hidden, state = self._read(batch, self._carried.get(batch.stream))
        self._carried[batch.stream] = detach_state(state)
        loss, learned = self._losses(hidden, batch.targets)
        self.log("train/loss", loss, prog_bar=True)
        if self.mtp_head is None:
            return learned
        weight = mtp_weight(self.mtp_loss_weight, self.global_step, self._planned_steps)
        return learned + weight * self._losses(self.mtp_head(hidden), mtp_targets(batch.targets))[1]

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss, in nats/token, and what is learned from: the same, where confidence costs nothing."""
        logits = self.net.head(hidden)
        loss = self._mean_over_processes(targets, token_nll(logits, targets, "sum"))
        if not self.confidence_penalty:
            return loss, loss
        weight = confidence_weight(self.confidence_penalty, self.global_step, self._planned_steps)
        return loss, loss + weight * self._mean_over_processes(targets, confidence(logits, targets))

    def _mean_over_processes(self, targets: Tensor, total: Tensor) -> Tensor:
        """Return this process's share of the mean over the tokens of all: they may score unequal numbers of them."""
        count = (targets != IGNORE_INDEX).sum().clamp(min=1)  # the second token of a row of one is not scored
        if self.trainer.world_size > 1:
            distributed.all_reduce(count)
            return total / count * self.trainer.world_size
        return total / count

    def _read(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        rows = len(batch.inputs)
        if state is None or len(state[0][0]) != rows:
            # StateStore are kept in float32 where the weights are in half of it.
            dtype = torch.promote_types(self.net.embedding.weight.dtype, torch.float32)
            state = self.net.zero_state(rows, self.device, dtype)
        separator = self.tokenizer.separator if self.reset_at_documents else None
        starts = None if separator is None else batch.inputs == separator
        return self.net.hidden(batch.inputs, reset_state_rows(state, batch.reset_mask), starts)

    def reset_carried_state(self) -> None:
        """Drop what was read, which a number that is not finite may have reached."""
        self._carried = {}

    # Evaluation: one pass over the whole text, its memory carried from batch to batch

    def on_validation_epoch_start(self) -> None:
        self._start_text()

    def on_test_epoch_start(self) -> None:
        self._start_text()

    def _start_text(self) -> None:
        self.score.reset()
        self._reading: State | None = None
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and datamodule.evaluation.dynamic:
            self._dynamic = DynamicEvaluation(self.net)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return what each target of the batch cost, [M], in nats."""
        return {"nats": self._score_batch(batch)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score_batch(batch)

    def _score_batch(self, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(self._dynamic is not None):
            each = self._nats(batch)
            self.score.update(each.detach(), self.token_lengths[batch.targets.flatten()])
            if self._dynamic is not None:
                self._dynamic.learn(each.mean())
                self._reading = detach_state(self._reading or [])
        return each.detach()

    def _nats(self, batch: Batch) -> Tensor:
        # On a CPU scores are in full precision, so that one machine's compare with another's.
        with torch.autocast("cpu", enabled=False):
            hidden, self._reading = self._read(batch, self._reading)
            logits = self.net.head(hidden)
        return token_nll(logits, batch.targets, "none")

    def on_validation_epoch_end(self) -> None:
        self._log_score("val")

    def on_test_epoch_end(self) -> None:
        self._log_score("test")

    def _log_score(self, prefix: str) -> None:
        if self._dynamic is not None:
            self._dynamic.restore()
            self._dynamic = None
        for name, value in self.score.compute().items():
            # Every process reads the whole text: the mean over them is the same figure.
            self.log(f"{prefix}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)

    def on_predict_epoch_start(self) -> None:
        self._start_text()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the tokens that were scored, [M], and minus the log-probability that each was given, [M]."""
        return {"tokens": batch.targets.flatten().cpu(), "nats": self._nats(batch).cpu()}

    # Optimization

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(
            self.net, self.optimizer, self.learning_rate, self.weight_decay, self.betas, self.mtp_head
        )
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._planned_steps = total = self.total_steps()

        def share(step: int) -> float:
            return warmup_cosine(step, self.warmup_steps, total, self.min_lr_ratio)

        scheduler = LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int | None:
        """Return the number of updates that the run is planned for; None where nothing but time ends it.

        Not ``trainer.estimated_stepping_batches``: asking for it here sets the loaders up too early, and the
        place in the data is then lost on resuming (Lightning issue 20550).
        """
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches: int = trainer.datamodule.batches_per_epoch()  # type: ignore[attr-defined]
            updates = -(-batches // trainer.accumulate_grad_batches)
            limits.append(updates * trainer.max_epochs)
        return min(limits, default=None)

    # Checkpoints

    def load_weights(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights of ``checkpoint``, and nothing else of it; UserError where it is of another model."""
        checkpoints.check_compatible(checkpoint, self.net, self.tokenizer)
        self.net.load_state_dict(checkpoints.model_weights(checkpoint))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: the model's description, the carried memory, the random numbers."""
        checkpoint[checkpoints.KEY] = checkpoints.describe(self.net, self.tokenizer)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        carried = {
            group: [[part.cpu() for part in layer] for layer in state] for group, state in self._carried.items()
        }
        processes = _gather({"random": random, "carried": carried})
        checkpoint[checkpoints.PROGRESS_KEY] = {
            "carried": _concatenate([process["carried"] for process in processes]),
            "random": [process["random"] for process in processes],
            "hyperparameters": self.hyperparameters(),
        }

    def _leave_training_out(self, checkpoint: dict[str, Any]) -> None:
        """Make the weights in ``checkpoint`` those that this module has, where only training needs more or less."""
        prefix, weights = "mtp_head.", checkpoint.get("state_dict", {})
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]
        weights.update({name: value for name, value in self.state_dict().items() if name.startswith(prefix)})

    def _share(self, carried: dict[int, list[list[Tensor]]]) -> dict[int, State]:
        """Return the memories of this process's rows, from those of the rows of all."""
        processes = self.trainer.world_size

        def own(part: Tensor) -> Tensor:
            return part.chunk(processes)[self.global_rank].to(self.device)

        return {
            group: [(own(past), own(memory)) for past, memory in state]
            for group, state in carried.items()
            if len(state[0][0]) % processes == 0
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; take up the carried memory and the random numbers."""
        checkpoints.check_compatible(checkpoint, self.net, self.tokenizer)
        progress = checkpoint.get(checkpoints.PROGRESS_KEY)
        if not self.trainer.training:
            self._leave_training_out(checkpoint)
        if progress is None:
            if self.trainer.training:
                raise UserError("the checkpoint holds a model, but no training to go on with")
            return
        before = progress["hyperparameters"]
        if self.trainer.training and self.optimizer != before.get("optimizer", self.optimizer):
            raise UserError(
                f"the checkpoint was trained by {before['optimizer']}, whose state {self.optimizer} cannot go on "
                f"with; keep model.optimizer, or begin a run with the weights by --init_from"
            )
        second_before = before.get("mtp_loss_weight", 0.0)  # older checkpoints are without
        if self.trainer.training and bool(second_before) != bool(self.mtp_loss_weight):
            raise UserError(
                f"the checkpoint was trained with model.mtp_loss_weight {second_before:g}, and cannot go on with "
                f"{self.mtp_loss_weight:g}; keep it, or begin a run with the weights by --init_from"
            )
        carried = progress["carried"]
        # Older checkpoints have one group alone, or None where nothing has been read.
        self._carried = self._share(carried if isinstance(carried, dict) else {0: carried} if carried else {})
        # A process that was not there before begins its random numbers anew, from the seed.
        self._random = dict(enumerate(progress["random"])).get(self.global_rank, {})
        changed = [
            f"{name} {before[name]} -> {new}"
            for name, new in self.hyperparameters().items()
            if new != before.get(name, new)  # an older checkpoint does not know all names
        ]
        if changed and self.trainer.training:
            rank_zero_info(f"Changed since the checkpoint, and in force from here on: {', '.join(changed)}")


def _gather(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what every process has, in the order of their ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    everyone: list[dict[str, Any]] = [{}] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    return everyone


def _concatenate(carried: list[dict[int, list[list[Tensor]]]]) -> dict[int, list[list[Tensor]]]:
    """Return the memories of several processes, by group, as those of one that reads all their rows."""
    return {
        group: [
            [torch.cat(parts) for parts in zip(*layers, strict=True)]
            for layers in zip(*(process[group] for process in carried), strict=True)
        ]
        for group in carried[0]
        if all(group in process for process in carried)
    }


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        upper = "" if high == float("inf") else f" and below {high:g}"
        raise UserError(f"model.{name} is {value}; it must be at least {low:g}{upper}")
