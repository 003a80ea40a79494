"""The LightningModule: the loss, the carried state, and what is written into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmrec.checkpoints import contents
from mmrec.checkpoints.chat_template import PLAIN, ChatOptions, ChatTemplate
from mmrec.checkpoints.state_file import SavedState
from mmrec.core.errors import UserError
from mmrec.data.batches import IGNORE_INDEX, Batch
from mmrec.inference.reading import Reader
from mmrec.model import Hidden, ModelConfig, RecurrentLM, State, reset_state_rows
from mmrec.model.without_autograd.training_pass import TrainingPass, has_training_pass
from mmrec.tokenizers import Tokenizer, token_lengths
from mmrec.training.arithmetic import arithmetic, choose_arithmetic
from mmrec.training.carried_state import CarriedState, gather, join_states
from mmrec.training.compat import average_without_waiting, is_logging_step
from mmrec.training.exchange import gather_all
from mmrec.training.losses import confidence_weight, nll_in_parts, summed_losses
from mmrec.training.metrics import TextScore
from mmrec.training.mtp import MTPHead, mtp_targets, mtp_weight
from mmrec.training.optim import clip_to_norm, make_optimizer
from mmrec.training.options import TrainingOptions, report_changes
from mmrec.training.schedule import PlannedSteps, learning_rate_share, steps_of_options
from mmrec.training.shared_reading import share_out
from mmrec.training.strategy import shard


class RecurrentLMModule(LightningModule):
    """Trains a :class:`mmrec.model.RecurrentLM` with the state carried from batch to batch.

    Args:
        config: the architecture of the model.
        tokenizer: the tokenizer of the data, from which it is filled in; kept in every checkpoint.
        options: the fields of :class:`mmrec.training.options.TrainingOptions`.
    """

    def __init__(
        self,
        config: ModelConfig = ModelConfig(),  # noqa: B008 -- immutable
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if tokenizer is None:
            raise UserError("the model has no tokenizer; it comes from the data")
        self.options = TrainingOptions(**options)
        if self.options.reset_at_documents and tokenizer.separator is None:
            raise UserError("model.reset_at_documents needs text that is cut into documents, as a large corpus is")
        self.tokenizer = tokenizer
        self.net = RecurrentLM(config, self.tokenizer.vocab_size, self.options.dropout)
        self.net.set_activation_checkpointing(self.options.activation_checkpointing)
        self.mtp_head = MTPHead(config.dim) if self.options.mtp_loss_weight else None
        self.chat_options = ChatOptions()
        self._chat: ChatTemplate | None = None
        self.score = TextScore()
        self.score.persistent(False)
        lengths = torch.from_numpy(token_lengths(self.tokenizer))
        self.token_lengths: Tensor
        self.register_buffer("token_lengths", lengths, persistent=False)
        self._is_sharded = False
        self._carried = CarriedState()
        self._random: dict[str, Tensor] = {}
        self._begins = True
        self._plan = PlannedSteps()
        self._compiled: Callable[..., tuple[Hidden, State]] | None = None
        self._training_pass: TrainingPass | None = None
        self._may_have_pass = True
        self._had_pass = False  # in the checkpoint that training is resumed from
        self.gradient_norm: Tensor | None = None  # of the update to come, once it was measured

    @property
    def planned_steps(self) -> int | None:
        """Number of updates at which the run is planned to end; None where nothing says so."""
        return self._plan.steps

    @property
    def decay_start(self) -> float | None:
        """Update (from 0) with which the schedule "wsd" begins to lower the rate; None where no end is planned."""
        return self._plan.decay_start(self.options)

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds only a part of each weight."""
        return self._is_sharded

    def configure_model(self) -> None:
        """Shard the model across the processes, where the strategy is to do so."""
        if self.device_mesh is not None and not self._is_sharded:
            shard(self.net, self.mtp_head, self.device_mesh["data_parallel"])
            self._is_sharded = True

    @property
    def chat(self) -> ChatTemplate | None:
        """The chat template of the model, if it has one: that of the checkpoint, changed by the options."""
        return self.chat_options.change(self._chat)

    # Training

    def setup(self, stage: str) -> None:
        choose_arithmetic(self.trainer, self.net.config.dim)

    def on_train_start(self) -> None:
        self.restore_training_state()
        average_without_waiting(self.trainer)
        if self.options.compile:
            self._compiled = torch.compile(self.net.hidden, dynamic=False)

    def restore_training_state(self) -> None:
        """Set the schedule and the rates, and restore the random numbers of a resumed run, after all that draws some.

        A second call leaves the random numbers as they are. A process that begins draws others than the first one,
        so that dropout leaves out other activations in each.
        """
        if self._begins and self.global_rank:
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        self._begins = False
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"].cpu())
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"].cpu())
        self._random = {}
        self._plan.by_options = steps_of_options(self.trainer)
        self._apply_rates()

    def plan_steps(self, steps: int, decay_start: float) -> None:
        """Plan with no more than ``steps`` updates in all, as many as there is time for, from the next one on.

        With the schedule "wsd" the rate begins to fall with update ``decay_start``.
        """
        self._plan.in_time, self._plan.decay_in_time = steps, decay_start
        self._apply_rates()

    def _apply_rates(self) -> None:
        """Make rates, decays and betas those asked for now: a resumed optimizer brings those it was saved with."""
        if not isinstance(scheduler := self.lr_schedulers(), LambdaLR):  # that of a callback has taken its place
            return
        scheduler.base_lrs = [self.options.learning_rate] * len(scheduler.base_lrs)
        groups = zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, self._weight_decays, strict=True)
        for group, share, weight_decay in groups:
            group["initial_lr"] = self.options.learning_rate
            group["lr"] = self.options.learning_rate * share(scheduler.last_epoch)
            group["weight_decay"] = weight_decay
            if "betas" in group:
                group["betas"] = self.options.betas

    def hyperparameters(self) -> dict[str, Any]:
        """Return what is compared when a run is resumed, and shown in TensorBoard's table of runs."""
        return asdict(self.options) | {"parameters": self.net.parameter_count()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Read one batch from the carried state on, and return the objective that is minimized.

        It is the loss, in nats/token, which is logged, and where they are on the confidence penalty and the weighted
        loss on the second token, which are not.
        """
        hidden, state = self._read(batch, self._carried.get(batch.stream))
        self._carried.update(batch.stream, state)
        targets = [batch.targets] if self.mtp_head is None else [batch.targets, mtp_targets(batch.targets)]
        counts = self._counts(targets)
        loss, learned = self._losses(hidden, targets[0], counts[0])
        if is_logging_step(self.trainer) or self.trainer.is_last_batch:
            self.log("train/loss", loss)  # not for the bar: Lightning would wait for the device at every update
        if self.mtp_head is None:
            return learned
        second = hidden._replace(x=self.mtp_head(hidden.x))
        weight = mtp_weight(self.options.mtp_loss_weight, self.global_step, self.planned_steps)
        return learned + weight * self._losses(second, targets[1], counts[1])[1]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradient of one batch to those of its update, of which each batch has an equal share.

        Lightning divides every loss by ``accumulate_grad_batches``. The update that ends an epoch may have fewer
        batches, and its gradient would be that much too small (Lightning issue 19987).
        """
        trainer = self.trainer
        planned, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
        before = trainer.fit_loop.batch_idx // planned * planned
        if 0 < batches - before < planned:
            loss = loss * (planned / (batches - before))
        super().backward(loss, *args, **kwargs)

    def _losses(self, hidden: Hidden, targets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss, in nats/token, and the objective: the same, where there is no confidence penalty."""
        nll, confident = summed_losses(self.net, hidden, targets, self.options.confidence_penalty > 0)
        loss = nll / count
        if not self.options.confidence_penalty:
            return loss, loss
        weight = confidence_weight(self.options.confidence_penalty, self.global_step, self.planned_steps)
        return loss, loss + weight * (confident / count)

    def _counts(self, targets: list[Tensor]) -> Tensor:
        """Return how many of each of ``targets`` are scored, by each process in the mean.

        The processes may score unequal numbers of tokens, and their gradients are averaged.
        """
        # The second token of a row of one is not scored.
        counts = torch.stack([(each != IGNORE_INDEX).sum() for each in targets]).clamp(min=1)
        if self.trainer.world_size > 1:
            return gather_all(counts[None]).sum(0) / self.trainer.world_size
        return counts

    def _read(self, batch: Batch, state: State | None) -> tuple[Hidden, State]:
        rows = len(batch.inputs)
        if state is None or len(state[0][0]) != rows:
            # States are kept in float32 where the weights are in half of it.
            dtype = torch.promote_types(self.net.embedding.weight.dtype, torch.float32)
            state = self.net.zero_state(rows, self.device, dtype)
        starts = self._starts(batch)
        state = reset_state_rows(state, batch.reset_mask)
        if self.training and starts is None and (trained := self._found_pass()):
            return trained.hidden(batch.inputs, state)
        hidden = self._compiled if self._compiled is not None and self.training else self.net.hidden
        return hidden(batch.inputs, state, starts)

    def _starts(self, batch: Batch) -> Tensor | None:
        """Return the tokens of ``batch`` [B, T], bool, before which the state is reset; None where nothing is."""
        separator = self.tokenizer.separator if self.options.reset_at_documents else None
        return None if separator is None else batch.inputs == separator

    def _found_pass(self) -> TrainingPass | None:
        """Return what computes batches of training without a graph, if anything does: the first of them decides."""
        if self._may_have_pass and self._training_pass is None:
            self._may_have_pass = self._compiled is None and has_training_pass(self.net)
            self._training_pass = TrainingPass(self.net) if self._may_have_pass else None
        return self._training_pass

    def reset_carried_state(self) -> None:
        """Drop what was read, which a number that is not finite may have reached."""
        self._carried.reset()

    # Evaluation: one pass over the whole text, the state carried from batch to batch

    def on_validation_epoch_start(self) -> None:
        self._start_text()
        self._shared = share_out(self.trainer, self.net, self._starts) if self._reader is None else None

    def _start_text(self) -> None:
        self.score.reset()
        self._reading: State | None = None
        datamodule = getattr(self.trainer, "datamodule", None)
        self._reader: Reader | None = None
        if datamodule is not None and datamodule.evaluation.learn:
            if self._is_sharded:
                raise UserError("--learn needs all weights in each process; leave trainer/fsdp out")
            self._reader = Reader(self.net, SavedState.empty(self.net).learning(self.net))

    on_test_epoch_start = on_predict_epoch_start = _start_text

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the negative log-likelihood of each target of the batch, [M], in nats."""
        return {"nats": self._score_batch(batch, None if self._shared is None else self._shared.nll(batch_idx))}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score_batch(batch)

    def _score_batch(self, batch: Batch, each: Tensor | None = None) -> Tensor:
        if each is None:
            each = self._nats(batch) if self._reader is None else self._learned_nats(batch, self._reader)
        self.score.update(each, self.token_lengths[batch.targets.flatten()])
        return each

    def _nats(self, batch: Batch) -> Tensor:
        # Scores are in full precision, so that one machine's compare with another's.
        with torch.autocast(self.device.type, enabled=False):
            hidden, self._reading = self._read(batch, self._reading)
            return nll_in_parts(self.net, hidden, batch.targets)

    def _learned_nats(self, batch: Batch, reader: Reader) -> Tensor:
        tokens = batch.targets[0]
        if reader.memory.position == 0:
            tokens = torch.cat([batch.inputs[0, :1], tokens])
        with torch.autocast(self.device.type, enabled=False):
            nll = torch.cat([part.nll for part in reader.read(tokens)]).to(self.device)
        return nll[-batch.targets.numel() :]

    def on_validation_epoch_end(self) -> None:
        self._log_score("val")

    def on_test_epoch_end(self) -> None:
        self._log_score("test")

    def _log_score(self, prefix: str) -> None:
        for name, value in self.score.compute().items():
            # Every process has the whole text's figures: the mean over them is the same.
            self.log(f"{prefix}/{name}", value.float(), prog_bar=name == "loss", sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return the tokens that were scored, [M], and minus the log-probability that each was given, [M]."""
        return {"tokens": batch.targets.flatten().cpu(), "nats": self._nats(batch).cpu()}

    # Optimization

    def configure_gradient_clipping(self, optimizer: Optimizer, *limit: Any, **limits: Any) -> None:
        """Clip by the norm that was measured for this update, if it was: Lightning would measure it again."""
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or not clip_to_norm(optimizer, norm, *limit, **limits):
            super().configure_gradient_clipping(optimizer, *limit, **limits)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = make_optimizer(self.net, self.options, self.mtp_head)
        self._weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._plan.by_options = steps_of_options(self.trainer)
        scheduler = LambdaLR(
            optimizer, lambda step: learning_rate_share(step, self.options, self.planned_steps, self.decay_start)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Checkpoints

    def load_weights(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights and the chat template of ``checkpoint``; UserError where it is of another model."""
        contents.check_compatible(checkpoint, self.net, self.tokenizer)
        self.net.load_state_dict(contents.model_weights(checkpoint))
        self._chat = contents.described_chat(checkpoint[contents.MODEL_KEY])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out: the model's description, the carried state, the random numbers."""
        checkpoint[contents.MODEL_KEY] = contents.describe_model(self.net, self.tokenizer, self.chat)
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        processes = gather({"random": random, "carried": self._carried.state_dict()})
        checkpoint[contents.PROGRESS_KEY] = {
            "carried": join_states([process["carried"] for process in processes]),
            "random": [process["random"] for process in processes],
            "hyperparameters": self.hyperparameters(),
            # Of what is saved before the first batch, by the validation that a run was stopped before, as it was.
            "training_pass": self._training_pass is not None or (self._had_pass and self._may_have_pass),
            **arithmetic(),
        }

    def _leave_training_out(self, checkpoint: dict[str, Any]) -> None:
        """Make the weights in ``checkpoint`` those that this module has, where only training needs more or less."""
        prefix, weights = "mtp_head.", checkpoint.get("state_dict", {})
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]
        weights.update({name: value for name, value in self.state_dict().items() if name.startswith(prefix)})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model; restore the carried state and the random numbers."""
        contents.check_compatible(checkpoint, self.net, self.tokenizer)
        self._chat = contents.described_chat(checkpoint[contents.MODEL_KEY])
        progress = checkpoint.get(contents.PROGRESS_KEY)
        if not self.trainer.training:
            self._leave_training_out(checkpoint)
        if progress is None:
            if self.trainer.training:
                raise UserError("the checkpoint holds a model, but no training to resume")
            return
        if self.trainer.training:
            self._compare_options(progress["hyperparameters"])
            choose_arithmetic(self.trainer, self.net.config.dim, progress)
            # A run keeps to the way it began with: what gradients are added up in is not the same to the last bit.
            self._may_have_pass = self._had_pass = progress.get("training_pass", False)
            report_changes("chat.", asdict(self._chat or PLAIN), asdict(self.chat or PLAIN))
        carried = progress["carried"]
        # Older checkpoints have one stream alone, or None where nothing has been read.
        states = carried if isinstance(carried, dict) else {0: carried} if carried else {}
        self._carried.load_state_dict(states, self.global_rank, self.trainer.world_size, self.device)
        # A process that was not there before begins its random numbers anew, from the seed.
        self._random = dict(enumerate(progress["random"])).get(self.global_rank, {})
        self._begins = not self._random

    def _compare_options(self, before: dict[str, Any]) -> None:
        """Say what has changed since the checkpoint; UserError where training cannot be resumed with it."""
        if self.options.optimizer != before.get("optimizer", self.options.optimizer):
            raise UserError(
                f"the checkpoint was trained by {before['optimizer']}, whose state {self.options.optimizer} cannot "
                f"take up; keep model.optimizer, or begin a run with the weights by --init_from"
            )
        mtp_before = before.get("mtp_loss_weight", 0.0)  # older checkpoints are without
        if bool(mtp_before) != bool(self.options.mtp_loss_weight):
            raise UserError(
                f"the checkpoint was trained with model.mtp_loss_weight {mtp_before:g}, and cannot be resumed with "
                f"{self.options.mtp_loss_weight:g}; keep it, or begin a run with the weights by --init_from"
            )
        report_changes("", before, self.hyperparameters())
