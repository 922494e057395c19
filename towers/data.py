"""The LightningDataModule: training batches and validation blocks."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning

from recsys.errors import ConfigError
from recsys.features.batching.batches import Batches, PlanName, TrainingEvents
from recsys.features.batching.negatives import UserNegatives
from recsys.split import duration
from recsys.towers.rules import TrainingRules, fitting_batch
from recsys.towers.two_tower import TowerRules
from recsys.towers.validation import Blocks, Validation


class InteractionData(lightning.LightningDataModule):
    """Training batches and validation blocks.

    Under DDP each rank makes its own equal part of every batch of the plan. A transformer that is
    trained at every position never asks for the vector of an empty history: there it needs
    `strategy="ddp_find_unused_parameters_true"`.

    Args:
        events: the training side.
        validation: queries to rank for, or None.
        rules: which examples stand together, negatives, masks.
        towers: what the towers read of a history; None: the default towers.
        statistics: whether the towers read item statistics.
        seed: of batches and draws.
        given: negatives of each user from a file, or None.

    Raises:
        ConfigError: the rules do not go together or ask for what this log has not, or nothing of
            it is an example.
    """

    def __init__(
        self,
        events: TrainingEvents,
        validation: Validation | None,
        rules: TrainingRules,
        *,
        towers: TowerRules | None = None,
        statistics: bool = False,
        seed: int = 0,
        given: UserNegatives | None = None,
    ) -> None:
        super().__init__()
        self.events, self.validation, self.rules = events, validation, rules
        self.towers = TowerRules() if towers is None else towers
        self.statistics, self.seed, self.given = statistics, seed, given
        self._plan = plan_of(rules, self.towers, statistics)
        _need_clock(rules, events)
        self.batches = self._make()
        if not len(self.batches):
            raise ConfigError(_no_example(self._plan, self.towers.max_history))

    def _make(self, rank: int = 0, world: int = 1) -> Batches:
        rules, towers = self.rules, self.towers
        timed = self.events.timeline.timed
        return Batches(
            self.events,
            plan=self._plan,
            batch_size=fitting_batch(rules, self.events.size),
            max_history=towers.max_history,
            window_span=None if rules.window_span is None else duration(rules.window_span),
            history_dropout=rules.history_dropout,
            ahead=(rules.ahead, rules.ahead_within),
            elapsed=timed and "recency" in towers.history_inputs,
            strength="strength" in towers.history_inputs,
            passed=towers.passed_over,
            example_age=towers.example_age,
            half_life=None if rules.half_life is None else duration(rules.half_life),
            negatives=rules.negatives,
            uniform_negatives=rules.uniform_negatives,
            queue=rules.queue,
            queue_after=rules.queue_after,
            known=rules.known,
            past_weight=rules.past_weight,
            # Apart, the weight is that of the term; each skip keeps its confidence.
            skip_weight=float(rules.skip_weight > 0)
            if rules.skips == "apart"
            else rules.skip_weight,
            skip_correction=rules.skip_correction,
            given=self.given,
            per_query=rules.given_per_query,
            counts=rules.counts,
            statistics=self.statistics,
            symmetric=rules.symmetric > 0,
            seed=self.seed,
            rank=rank,
            world=world,
        )

    def setup(self, stage: str) -> None:
        """Take this rank's part; Lightning calls it once the ranks are known."""
        world = self.trainer.world_size if self.trainer is not None else 1
        if world > 1 and self.batches.share.world != world:
            self.batches = self._make(self.trainer.global_rank, world)  # type: ignore[union-attr]

    def train_dataloader(self) -> Batches:
        return self.batches

    def state_dict(self) -> dict[str, Any]:
        """Where the batches are: of a loader's own state Lightning minds only that of mid-epoch."""
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches.load_state_dict(state_dict)

    def val_dataloader(self) -> Any:
        return [] if self.validation is None else Blocks(self.validation)


def plan_of(rules: TrainingRules, towers: TowerRules, statistics: bool) -> PlanName:
    """How events form batches, "auto" settled.

    Raises:
        ConfigError: the towers or other rules do not go with it.
    """
    plan = _plan_of(rules, towers, statistics)
    if rules.since is not None and plan not in ("random", "in_time"):
        raise ConfigError(
            f'training.since = "{rules.since}" picks single events, but training.batches = '
            f'"{plan}" takes whole users: leave training.since out, or set training.batches to '
            '"random" or "in_time".'
        )
    return plan


def _plan_of(rules: TrainingRules, towers: TowerRules, statistics: bool) -> PlanName:
    if towers.passed_over and rules.batches == "by_user":
        raise ConfigError(
            'training.batches = "by_user" asks once for everything a user chose, and what was '
            "passed over beside it would tell it: set towers.passed_over to false, or take other "
            "batches."
        )
    if towers.example_age and rules.batches == "by_user":
        raise ConfigError(
            'training.batches = "by_user" asks once for everything a user chose, and nothing comes '
            "after it: set towers.example_age to 0, or take other batches."
        )
    if rules.batches == "auto":
        if statistics:
            return "in_time"
        return "sequences" if towers.history == "transformer" else "random"
    if statistics and rules.batches != "in_time":
        raise ConfigError(
            f'training.batches is "{rules.batches}", but the towers read item statistics, which '
            'need batches of one moment: set it to "in_time", or towers.statistics to false.'
        )
    if rules.batches == "sequences" and towers.history != "transformer":
        raise ConfigError(
            'training.batches = "sequences" trains at every position, which only '
            'towers.history = "transformer" can.'
        )
    return rules.batches


def _need_clock(rules: TrainingRules, events: TrainingEvents) -> None:
    """Refuse what counts time, or what was shown, on a log that does not say it."""
    timed = events.timeline.timed
    clock = "name the column of time in [data.columns]"
    for name in ("since", "half_life", "window_span"):
        span = getattr(rules, name)
        if span is not None and not timed:
            raise ConfigError(
                f'training.{name} = "{span}" is a span of time, but this log has no clock: leave '
                f"it out, or {clock}."
            )
    if rules.batches == "in_time" and not timed:
        raise ConfigError(
            'training.batches = "in_time" makes windows of time, but this log has no clock: set '
            f'it to "random", or {clock}.'
        )
    if rules.skip_correction and (events.timeline.shown is None or not timed):
        raise ConfigError(
            f"training.skip_correction = {rules.skip_correction} counts how often items were "
            "shown, but this log has no impression lists with a clock: set it to 0."
        )


def _no_example(plan: PlanName, max_history: int) -> str:
    """Why a plan has no batch, and what helps."""
    there_is_none = "There is no example to learn from: "
    if plan == "sequences":
        return (
            f"{there_is_none}no user has events at two moments among its newest {max_history + 1}, "
            'which training.batches = "sequences" needs. Set it to "random".'
        )
    if plan == "ahead":
        return (
            f"{there_is_none}no user has events at two moments, which training.batches = "
            '"ahead" needs. Set it to "random".'
        )
    return f"{there_is_none}the training side has no positive event. Take other values in [split]."
