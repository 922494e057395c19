"""LightningModule of the two towers.

Legend: Q queries, B examples, N candidates, M encoded rows, R distinct item rows, D dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.features.batching.batch import Batch
from recsys.features.batching.batches import Batches
from recsys.search import ExactIndex
from recsys.towers.audit import Audit, Draws, audit
from recsys.towers.data import ShownLists, ValidationBlock
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.logits import BatchLogits
from recsys.towers.losses import LOSSES, Loss, skip_softmax, symmetric
from recsys.towers.memory_bank import MemoryBank
from recsys.towers.mining import from_state, mine_again, to_state
from recsys.towers.optimizer import RowAdam, clip_gradients
from recsys.towers.rules import METRICS, OWN_LOSS, TrainingRules, imported, metric_at
from recsys.towers.text import text_groups
from recsys.towers.two_tower import TwoTower

MAX_LOGITS = 1 << 28
"""Entries of the score matrix, a GiB of float32, beyond which it is worked through in tiles."""
TEMPERATURE = 0.1
"""Where a learned temperature starts."""
WARMUP_STEPS = 100
"""Steps over which the learning rate rises from zero."""


class Temperature(nn.Module):
    """A fixed or learned divisor of the score, kept as a log and within [0.01, 1]."""

    def __init__(self, value: float | Literal["learned"]) -> None:
        super().__init__()
        self.learned = value == "learned"
        start = TEMPERATURE if isinstance(value, str) else value
        self.log = nn.Parameter(torch.tensor(math.log(start)), requires_grad=self.learned)

    def forward(self) -> Tensor:
        # 1/τ ≤ 100 as in CLIP: sharper than that, gradients vanish on all but one candidate.
        if not self.learned:
            return self.log.exp()
        # The gradient passes the bounds, so that a step too far can be taken back.
        over = self.log.detach() - self.log.detach().clamp(math.log(0.01), 0.0)
        return (self.log - over).exp()


class TwoTowerModule(lightning.LightningModule):
    """Trains `TwoTower` by a loss over all its negatives; validates by full ranking.

    Args:
        model: both towers.
        rules: how to learn.
        loss: a function of `BatchLogits`, in place of `rules.loss`.
        audits: folder in which each epoch's audit of the negatives is written, or None.
    """

    def __init__(
        self,
        model: TwoTower,
        rules: TrainingRules,
        loss: Loss | None = None,
        audits: Path | None = None,
    ) -> None:
        super().__init__()
        self.model, self.rules = model, rules
        self.loss = loss or loss_of(rules)
        self.temperature = Temperature(rules.temperature)
        self.memory_bank = None
        if rules.negatives.queue:
            self.memory_bank = MemoryBank(model.items.n_rows, model.rules.dimension)
            # Ranks see other items each; DDP would write rank 0's memory over all of them.
            self._ddp_params_and_buffers_to_ignore = [
                f"memory_bank.{name}" for name, _ in self.memory_bank.named_buffers()
            ]
        self._vectors: tuple[int | None, ExactIndex] | None = None
        self._values: list[np.ndarray] = []
        self._since = (0.0, 0)
        self._logging = True
        self._audits, self._auditing = audits, False
        self._audit: Audit | None = None
        self._draws: Draws | None = None

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(Q, D) users and (M, D) items of a batch."""
        model = self.model
        texts = model.read_texts(batch.rows)
        # What the batch's own users did must not say which of the candidates they chose.
        left_out = batch.user.users if self.training else None
        embedded = model.embed_items(batch.rows, batch.statistics, texts, left_out)  # (R, D)
        entries = model.embed_history(batch.rows, batch.statistics, texts, embedded=embedded)
        users = model.encode_users(batch.user, entries)
        return users, model.item_tower(embedded[: batch.n_encoded])

    def logits(self, batch: Batch, users: Tensor, items: Tensor) -> BatchLogits:
        """What the loss is a function of."""
        logq = self.rules.negatives.logq
        log_weight = -logq * batch.log_inclusion
        queued = None
        if self.memory_bank is not None and len(batch.queued):
            queued, usable = self.memory_bank.read(batch.queued)
            blocked = torch.zeros_like(log_weight)
            blocked[batch.n_candidates :].masked_fill_(~usable, -torch.inf)
            log_weight = log_weight + blocked
        of_users = None
        if logq and batch.user_log_inclusion is not None:
            of_users = -logq * batch.user_log_inclusion
        return BatchLogits(
            users=users,
            items=items,
            target=batch.target,
            temperature=self.temperature(),
            log_weight=log_weight,
            owner=batch.owner,
            queued=queued,
            positive_mask=batch.positive_mask,
            per_query=batch.per_query,
            per_query_log_weight=batch.per_query_log_weight,
            per_query_source=batch.per_query_source,
            user_log_weight=of_users,
            # As many rows as fit or more are no tiles, so that nothing is made again then.
            tile=max(1, MAX_LOGITS // len(log_weight)),
        )

    def batch_loss(self, batch: Batch) -> Tensor:
        """() loss of a batch: the mean over examples, weighted by their events' weights."""
        users, items = self.encode(batch)
        logits = self.logits(batch, users, items)
        if self._auditing:
            self._audit = self._audited(batch, users, items, logits)
        loss = self.loss(logits)  # (B,)
        if self.rules.skip_weight and batch.per_query.shape[1]:
            loss = loss + self.rules.skip_weight * skip_softmax(logits)
        if self.memory_bank is not None and self.training:
            n = batch.n_candidates
            self.memory_bank.write(batch.rows[:n], items[:n].detach())
        # By the mean of the training side: a window of old events, all of little weight, is to
        # weigh little, which a mean over the batch's own weights would hide.
        mean = batch.weight.mean() if batch.mean_weight is None else batch.mean_weight
        return (loss * batch.weight).mean() / (mean + 1e-9)  # 0 when nothing weighs

    def _audited(self, batch: Batch, users: Tensor, items: Tensor, logits: BatchLogits) -> Audit:
        """What this batch's negatives do, from the vectors that its loss is made of."""
        self._auditing = False
        return audit(
            users.detach(),
            items.detach(),
            batch,
            self.temperature().detach(),
            queued=logits.queued,
            log_weight=logits.log_weight,
            skip_share=self.rules.skip_weight,
        )

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        # A call of `log` costs as much as a layer, and only every so many steps is written anyway.
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._logging = (self.global_step + 1) % every == 0 or self.trainer.is_last_batch
        # The middle of the epoch: the queue is full there, the first batch has none.
        self._auditing = index == int(self.trainer.num_training_batches) // 2
        # Draws are counted on the host; elsewhere that waits for the device, so not at each step.
        if self._draws is not None and (self._logging or self.device.type == "cpu"):
            self._draws.add(batch)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.batch_loss(batch)
        if self._logging:
            self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_train_start(self) -> None:
        # The batches say when an epoch begins: Lightning does not announce the one after a
        # checkpoint of an epoch's last step.
        batches = self.trainer.train_dataloader
        if self.rules.mined.per_query and isinstance(batches, Batches):
            batches.before_epoch = lambda epoch: mine_again(
                self.model, batches, self.rules.mined, epoch
            )

    def on_train_epoch_start(self) -> None:
        self._since = (time.perf_counter(), 0)
        self._draws = Draws(self.model.items.n_rows)

    def on_train_epoch_end(self) -> None:
        # A run that went on in mid-epoch has seen a part of it only, and says nothing of that one.
        data = getattr(self.trainer, "datamodule", None)
        if self._audit is None or self._draws is None or data is None:
            return
        popularity = data.batches.events.timeline.popularity()
        found = replace(self._audit, draws=self._draws.errors(popularity))
        self.log_dict(found.metrics())
        if self._audits is not None and self.trainer.is_global_zero:
            found.write(self._audits, self.current_epoch)
        self._audit = self._draws = None

    def on_train_batch_end(self, _outputs: Any, batch: Batch, _index: int) -> None:
        start, count = self._since
        self._since = (start, count + len(batch))
        if not self._logging:
            return
        rate = self._since[1] / max(time.perf_counter() - start, 1e-9)
        self.log("train/examples_per_second", rate, prog_bar=True, batch_size=len(batch))
        if self.temperature.learned:
            self.log("train/temperature", self.temperature(), batch_size=len(batch))

    def on_validation_epoch_start(self) -> None:
        self._vectors, self._values = None, []

    def validation_step(self, block: ValidationBlock, _: int) -> None:
        """Rank all items for a block of queries and keep one value a query."""
        validation, rows, as_of = block.validation, block.rows, block.as_of
        timeline = validation.timeline
        if self._vectors is None or self._vectors[0] != as_of:
            everything = np.arange(timeline.n_items)
            vectors = encode_items(self.model, everything, timeline, as_of)
            self._vectors = (as_of, ExactIndex(vectors, self.device))
        queries = validation.queries.take(rows)
        users = encode_users(self.model, queries, timeline, as_of)
        name, k = metric_at(self._ranked)
        ranked, _scores = self._vectors[1].search(
            users,
            k,
            allowed=timeline.alive(as_of),
            exclude=None if validation.seen is None else validation.seen.take(rows),
        )
        self._values.append(METRICS[name](ranked, validation.targets.take(rows), k))

    def on_validation_epoch_end(self) -> None:
        value = float(np.nanmean(np.concatenate(self._values))) if self._values else 0.0
        self._vectors, self._values = None, []
        self.log(f"val/{self._ranked}", value, prog_bar=True)
        if self.rules.monitor == "auc":
            shown = self._lists()
            self.log("val/auc", float(np.nanmean(shown.auc(self.model))), prog_bar=True)

    @property
    def _ranked(self) -> str:
        """The metric of full ranking that is told, whatever picks the epoch."""
        return "ndcg_at_20" if self.rules.monitor == "auc" else self.rules.monitor

    def _lists(self) -> ShownLists:
        data = getattr(self.trainer, "datamodule", None)
        if data is None or data.validation is None or data.validation.shown is None:
            raise ConfigError(
                'training.monitor = "auc" needs an InteractionData whose validation has lists.'
            )
        return data.validation.shown

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a run that goes on has to take up again: generators of dropout, mined negatives."""
        checkpoint["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["random_cuda"] = torch.cuda.get_rng_state(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            checkpoint["mined"] = to_state(data.batches.mined)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "random" in checkpoint:
            torch.set_rng_state(checkpoint["random"].cpu())
        if "random_cuda" in checkpoint and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["random_cuda"].cpu())
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            data.batches.mined = from_state(checkpoint.get("mined", {}))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        rules = self.rules
        texts = text_groups(self, rules.text_learning_rate, rules.weight_decay)
        of_text = {id(parameter) for group in texts for parameter in group["params"]}
        sparse = {
            id(module.weight)
            for module in self.modules()
            if isinstance(module, nn.Embedding) and module.sparse
        }
        tables: list[Tensor] = []
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for parameter in self.parameters():
            if not parameter.requires_grad or id(parameter) in of_text:
                continue
            if id(parameter) in sparse:
                tables.append(parameter)
            else:
                (matrices if parameter.ndim > 1 else rest).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": tables, "lr": rules.learning_rate},
            {"params": matrices, "weight_decay": rules.weight_decay},
            {"params": rest},
            *texts,
        ]
        optimizer = RowAdam([g for g in groups if g["params"]], lr=rules.learning_rate)
        steps = None
        if rules.schedule == "cosine":
            # Of the epochs asked for, not those of this fit: a refit of fewer epochs is to follow
            # the same curve as the training that chose their number.
            each = self.trainer.estimated_stepping_batches / max(1, self.trainer.max_epochs or 1)
            steps = math.ceil(each * rules.epochs)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, partial(learning_rate_at, warmup=WARMUP_STEPS, steps=steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip sparse and dense gradients by their common norm, which Lightning cannot."""
        clip_gradients(
            (p for group in optimizer.param_groups for p in group["params"]),
            self.rules.gradient_clip if gradient_clip_val is None else gradient_clip_val,
        )


def loss_of(rules: TrainingRules) -> Loss:
    """The loss that the rules name, in one direction or both."""
    loss: Loss = LOSSES[rules.loss] if rules.loss in LOSSES else imported(rules.loss, OWN_LOSS)
    if rules.symmetric:
        return partial(symmetric, loss=loss, item_share=rules.symmetric)
    return loss


def learning_rate_at(step: int, *, warmup: int, steps: int | None) -> float:
    """Share of the learning rate at a step, counted from 0.

    Args:
        step: which.
        warmup: steps over which it rises.
        steps: after which it has fallen to zero along half a cosine; None: it stays.
    """
    risen = min(1.0, (step + 1) / (warmup + 1))
    if steps is None:
        return risen
    return risen * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


AVERAGE_EVERY = 8
"""Steps from one addition to the average to the next."""


class Average(WeightAveraging):
    """The moving average that `training.average` asks for; until the warm-up ends it is the weights
    as they are, so that a run of few steps keeps what it learned.

    Args:
        rules: how much a step leaves.
    """

    def __init__(self, rules: TrainingRules) -> None:
        decay, warmup = rules.average**AVERAGE_EVERY, WARMUP_STEPS

        def mix(average: Tensor, now: Tensor, added: Tensor | int) -> Tensor:
            return now if added < warmup else average.lerp(now, 1 - decay)

        # Lightning would average whole numbers among the buffers, and truncate what comes of it.
        super().__init__(use_buffers=False, avg_fn=mix)
        self._warmup = warmup

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Each step of the warm-up, and then every so many."""
        if step_idx is None:
            return False
        return step_idx < self._warmup or step_idx % AVERAGE_EVERY == 0


class EpochLines(lightning.Callback):
    """Tells each epoch in a line, for logs that no progress bar reaches.

    Args:
        say: is given the line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Loss, examples a second and, where it was measured, the validation metric."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        parts = [f"epoch {trainer.current_epoch + 1} of at most {trainer.max_epochs}"]
        if "train/loss" in found:
            parts.append(f"loss {found['train/loss']:.3f}")
        parts += [f"{n[4:]} {value:.4f}" for n, value in found.items() if n.startswith("val/")]
        if "train/examples_per_second" in found:
            parts.append(f"{found['train/examples_per_second']:,.0f} examples/s")
        self._say(", ".join(parts))
