"""The LightningModule and LightningDataModule; both work in anybody's own Trainer.

Legend: B examples, N candidates, M encoded rows, R distinct item rows, D dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as lightning
import torch
from pydantic import Field
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from features.batches import Batch, Batches, Queries, TrainingEvents
from features.timeline import Timeline
from recsys.metrics import hit_rate_at, ndcg_at, recall_at
from recsys.ragged import Ragged
from recsys.search import ExactIndex
from recsys.tables import Strict
from towers.encode import encode_items, encode_users
from towers.losses import in_batch_softmax
from towers.optimizer import RowAdam, clip_gradients
from towers.two_tower import TwoTower


class TrainingRules(Strict):
    """[training]: how the towers learn."""

    batch_size: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """auto: the power of two nearest to a hundredth of the training events, from 128 to 1024, so
    that a small log still gets a hundred steps an epoch."""
    epochs: int = Field(30, ge=1)
    """At most; early stopping usually ends sooner."""
    patience: int = Field(4, ge=1)
    """Epochs without a better validation metric before training stops."""
    refit: bool = True
    """Once the epoch is chosen, train again from the start on train and validation side together,
    for so many epochs: what happened last before the cut-off says most about what comes next."""
    monitor: str = "ndcg_at_20"
    """Picks the epoch, by full ranking of the validation side: recall_at_K, ndcg_at_K or
    hit_rate_at_K."""
    learning_rate: float = Field(2e-3, gt=0)
    """Of the dense layers."""
    table_learning_rate: float | None = Field(None, gt=0)
    """Of id tables; None: the same."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of the dense layers' matrices, decoupled; never of the temperature, biases or id tables."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises from zero."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest common norm of all gradients of a step."""
    temperature: float = Field(0.1, gt=0)
    """Divides the score; where learning starts when it is learned."""
    learn_temperature: bool = False
    logq: bool = True
    """Correct drawn negatives by their inclusion probability."""
    known: Literal["all", "past", "none"] = "all"
    """Items of the user that are never its negatives: all learned from, or those before."""
    uniform_negatives: int = Field(0, ge=0)
    """Candidates drawn uniformly for the whole batch, beside the other examples' items."""
    skips: Literal["apart", "in_softmax"] = "apart"
    """apart: a softmax of the positive against the skips of its own request, beside the main one.
    in_softmax: skips stand among the drawn negatives; each of those stands for many items, so that
    weights far above 1 are needed for skips to be felt."""
    skip_weight: float = Field(0.3, ge=0)
    """apart: weight of the term; in_softmax: how many items a skip counts as; 0: no skips."""
    batches: Literal["auto", "random", "in_time"] = "auto"
    """in_time: a batch is a window of consecutive events; auto: where item statistics need it."""
    validation_queries: int = Field(20_000, ge=1)
    """At most so many validation queries an epoch, a seeded sample."""
    accelerator: str = "auto"
    precision: str = "32-true"
    """As Lightning's Trainer takes it: 32-true, bf16-mixed, 16-mixed."""


class Temperature(nn.Module):
    """A fixed or learned divisor of the score, kept as a log and within [0.01, 1]."""

    def __init__(self, value: float, learned: bool) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(value)), requires_grad=learned)
        self.learned = learned

    def forward(self) -> Tensor:
        # 1/τ ≤ 100 as in CLIP: sharper than that, gradients vanish on all but one candidate.
        if not self.learned:
            return self.log.exp()
        # The gradient passes the bounds, so that a step too far can be taken back.
        over = self.log.detach() - self.log.detach().clamp(math.log(0.01), 0.0)
        return (self.log - over).exp()


@dataclass(frozen=True)
class Validation:
    """Queries of the validation side and what each went on to choose.

    Args:
        queries: who asked; each at its own time or all at the cut-off.
        targets: item rows chosen.
        seen: item rows never to be answered, or None when repeats are allowed.
        timeline: from which item statistics are taken.
        moments: (Q,) moment of each query's item statistics, non-decreasing; None without clock.
    """

    queries: Queries
    targets: Ragged
    seen: Ragged | None
    timeline: Timeline
    moments: np.ndarray | None

    def blocks(self, size: int = 4096) -> Iterator[tuple[np.ndarray, int | None]]:
        """Query rows that share a moment, at most `size` at once, and the moment."""
        everyone = np.arange(len(self.queries))
        groups: list[np.ndarray] = [everyone]
        moments: list[int | None] = [None]
        if self.moments is not None:
            distinct, first = np.unique(self.moments, return_index=True)
            groups, moments = np.split(everyone, first[1:]), [int(m) for m in distinct]
        for rows, moment in zip(groups, moments, strict=True):
            for start in range(0, len(rows), size):
                yield rows[start : start + size], moment


METRICS = {"recall_at": recall_at, "ndcg_at": ndcg_at, "hit_rate_at": hit_rate_at}


class TwoTowerModule(lightning.LightningModule):
    """Trains `TwoTower` with the in-batch softmax; validates by full ranking.

    Args:
        model: both towers.
        rules: how to learn.
    """

    def __init__(self, model: TwoTower, rules: TrainingRules) -> None:
        super().__init__()
        self.model, self.rules = model, rules
        self.temperature = Temperature(rules.temperature, rules.learn_temperature)
        self._vectors: tuple[int | None, ExactIndex] | None = None
        self._values: list[np.ndarray] = []
        self._since = (0.0, 0)
        self._telling = True

    def loss(self, batch: Batch) -> Tensor:
        """() loss of a batch."""
        model = self.model
        embedded = model.embed_items(batch.rows, batch.statistics)  # (R, D)
        users = model.encode_users(batch.user, embedded)  # (B, D)
        items = model.item_tower(embedded[: batch.n_encoded])  # (M, D)
        return in_batch_softmax(
            users,
            items,
            batch.target,
            log_inclusion=batch.log_inclusion
            if self.rules.logq
            else torch.zeros_like(batch.log_inclusion),
            temperature=self.temperature(),
            known=batch.known,
            skips=batch.skips,
            skip_log_weight=batch.skip_log_weight,
            skip_share=self.rules.skip_weight if self.rules.skips == "apart" else None,
            weight=batch.weight,
        )

    def on_train_batch_start(self, _batch: Batch, _index: int) -> None:
        # A call of `log` costs as much as a layer, and only every so many steps is written anyway.
        every = max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._telling = (self.global_step + 1) % every == 0 or self.trainer.is_last_batch

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.loss(batch)
        if self._telling:
            self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_train_epoch_start(self) -> None:
        self._since = (time.perf_counter(), 0)

    def on_train_batch_end(self, _outputs: Any, batch: Batch, _index: int) -> None:
        start, count = self._since
        self._since = (start, count + len(batch))
        if not self._telling:
            return
        rate = self._since[1] / max(time.perf_counter() - start, 1e-9)
        self.log("train/examples_per_second", rate, prog_bar=True, batch_size=len(batch))
        if self.rules.learn_temperature:
            self.log("train/temperature", self.temperature(), batch_size=len(batch))

    def on_validation_epoch_start(self) -> None:
        self._vectors, self._values = None, []

    def validation_step(self, block: ValidationBlock, _: int) -> None:
        """Rank all items for a block of queries and keep one value a query."""
        validation, rows, moment = block.validation, block.rows, block.moment
        timeline = validation.timeline
        if self._vectors is None or self._vectors[0] != moment:
            everything = np.arange(timeline.n_items)
            vectors = encode_items(self.model, everything, timeline, moment)
            self._vectors = (moment, ExactIndex(vectors, self.device))
        queries = validation.queries.take(rows)
        users = encode_users(self.model, queries, timeline, moment)
        name, k = metric_at(self.rules.monitor)
        ranked, _scores = self._vectors[1].search(
            users,
            k,
            allowed=timeline.alive(moment),
            exclude=None if validation.seen is None else validation.seen.take(rows),
        )
        self._values.append(METRICS[name](ranked, validation.targets.take(rows), k))

    def on_validation_epoch_end(self) -> None:
        value = float(np.nanmean(np.concatenate(self._values))) if self._values else 0.0
        self._vectors, self._values = None, []
        self.log(f"val/{self.rules.monitor}", value, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Dropout is drawn from torch's own generators: a run that goes on takes them up again."""
        checkpoint["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            checkpoint["random_cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "random" in checkpoint:
            torch.set_rng_state(checkpoint["random"].cpu())
        if "random_cuda" in checkpoint and torch.cuda.is_available():
            torch.cuda.set_rng_state(checkpoint["random_cuda"].cpu())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        rules = self.rules
        tables: list[Tensor] = []
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        sparse = {
            id(module.weight)
            for module in self.modules()
            if isinstance(module, nn.Embedding) and module.sparse
        }
        for parameter in self.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in sparse:
                tables.append(parameter)
            else:
                (matrices if parameter.ndim > 1 else rest).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": tables, "lr": rules.table_learning_rate or rules.learning_rate},
            {"params": matrices, "weight_decay": rules.weight_decay},
            {"params": rest},
        ]
        optimizer = RowAdam([g for g in groups if g["params"]], lr=rules.learning_rate)
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (rules.warmup_steps + 1))
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": warmup, "interval": "step"},
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


def fitting_batch(rules: TrainingRules, events: int) -> int:
    """Examples of a batch, as `[training] batch_size` says for so many training events."""
    if rules.batch_size != "auto":
        return rules.batch_size
    return 2 ** round(math.log2(min(max(events / 100, 128), 1024)))


def metric_at(name: str) -> tuple[str, int]:
    """Split "ndcg_at_20" into its function's name and k.

    Raises:
        ValueError: no such metric.
    """
    stem, _, k = name.rpartition("_")
    if stem not in METRICS or not k.isdigit() or int(k) < 1:
        raise ValueError(f"{name!r} is no metric; use {', '.join(m + '_K' for m in METRICS)}.")
    return stem, int(k)


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


@dataclass(frozen=True)
class ValidationBlock:
    """Rows of a `Validation` that share a moment."""

    validation: Validation
    rows: np.ndarray
    moment: int | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ValidationBlock:
        """Nothing to move: blocks are made of row numbers."""
        return self


class _Blocks:
    """The validation blocks as a loader with a length."""

    def __init__(self, validation: Validation) -> None:
        self._blocks = [ValidationBlock(validation, *block) for block in validation.blocks()]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[ValidationBlock]:
        return iter(self._blocks)


class InteractionData(lightning.LightningDataModule):
    """Training batches and validation blocks.

    Args:
        events: the training side.
        validation: queries to rank for, or None.
        rules: batch size, negatives, masks.
        max_history: newest history entries kept.
        statistics: whether the towers read item statistics.
        seed: of batches and uniform negatives.
    """

    def __init__(
        self,
        events: TrainingEvents,
        validation: Validation | None,
        rules: TrainingRules,
        *,
        max_history: int,
        statistics: bool,
        seed: int,
    ) -> None:
        super().__init__()
        in_time = rules.batches == "in_time" or (rules.batches == "auto" and statistics)
        self.validation = validation
        self.batches = Batches(
            events,
            batch_size=fitting_batch(rules, events.size),
            max_history=max_history,
            uniform_negatives=rules.uniform_negatives,
            known=rules.known,
            # Apart, the weight is that of the term; each skip keeps its confidence.
            skip_weight=float(rules.skip_weight > 0)
            if rules.skips == "apart"
            else rules.skip_weight,
            in_time=in_time,
            statistics=statistics,
            seed=seed,
        )

    def train_dataloader(self) -> Batches:
        return self.batches

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are: of a loader's own state Lightning minds only that of mid-epoch."""
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches.load_state_dict(state_dict)

    def val_dataloader(self) -> Any:
        return [] if self.validation is None else _Blocks(self.validation)
