"""LightningDataModule: training batches and the queries of the validation side.

Legend: Q queries, T shown items in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as lightning
import torch

from recsys.errors import ConfigError
from recsys.features.batching.batch import Queries
from recsys.features.batching.batches import Batches, SamplerName, TrainingEvents
from recsys.features.batching.examples import ask, asking, timeline_until, training_events
from recsys.features.batching.negatives import UserNegatives
from recsys.features.prepared.dataset import Dataset
from recsys.features.prepared.timeline import Timeline
from recsys.metrics import auc
from recsys.ragged import Ragged
from recsys.search import pair_scores
from recsys.split import duration
from recsys.tables import Side
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.rules import SampledNegatives, TowerRules, TrainingRules, fitting_batch

if TYPE_CHECKING:
    from recsys.towers.two_tower import TwoTower

HISTORY_DROPOUT = 0.2
"""by_user: share of a user's items left out of the history that foretells all of them."""
QUEUE_AFTER = 500
"""Steps before the queue is used: vectors have to settle first."""
NEGATIVES_PER_QUERY = 10
"""Of the negatives that a file has for a user, at most so many are drawn for each example."""
VALIDATION_QUERIES = 20_000
"""Most validation queries of an epoch, a seeded sample."""


@dataclass(frozen=True)
class Validation:
    """Queries of the validation side and what each went on to choose.

    Args:
        queries: who asked; each at its own time or all at the cut-off.
        targets: item rows chosen.
        seen: item rows never to be answered, or None when repeats are allowed.
        timeline: from which item statistics are taken.
        moments: (Q,) moment of each query's item statistics, non-decreasing; None without clock.
        shown: lists to be put in order, where their AUC picks the epoch.
    """

    queries: Queries
    targets: Ragged
    seen: Ragged | None
    timeline: Timeline
    as_of_times: np.ndarray | None
    shown: ShownLists | None = None

    def blocks(self, size: int = 4096) -> Iterator[tuple[np.ndarray, int | None]]:
        """Query rows that share a moment, at most `size` at once, and the moment."""
        everyone = np.arange(len(self.queries))
        groups: list[np.ndarray] = [everyone]
        as_of_times: list[int | None] = [None]
        if self.as_of_times is not None:
            distinct, first = np.unique(self.as_of_times, return_index=True)
            groups, as_of_times = np.split(everyone, first[1:]), [int(m) for m in distinct]
        for rows, as_of in zip(groups, as_of_times, strict=True):
            for start in range(0, len(rows), size):
                yield rows[start : start + size], as_of


@dataclass(frozen=True)
class ShownLists:
    """Lists shown on the validation side that hold something clicked and something not.

    Args:
        queries: (Q,) who was shown each.
        items: Q ragged item rows shown.
        clicked: (T,) bool beside `items.values`.
        timeline: from which item statistics are taken.
        moments: (Q,) moment of each list's item statistics, non-decreasing.
    """

    queries: Queries
    items: Ragged
    clicked: np.ndarray
    timeline: Timeline
    as_of_times: np.ndarray

    def auc(self, model: TwoTower) -> np.ndarray:
        """(Q,) AUC of each list as the towers order it."""
        scores = np.empty(len(self.items.values), np.float32)
        distinct, first = np.unique(self.as_of_times, return_index=True)
        ends = np.append(first[1:], len(self.as_of_times))
        for as_of, low, high in zip(distinct.tolist(), first, ends, strict=True):
            part = np.arange(low, high)
            users = encode_users(model, self.queries.take(part), self.timeline, as_of)
            items = self.items.take(part)
            rows, place = np.unique(items.values, return_inverse=True)
            vectors = encode_items(model, rows.astype(np.int64), self.timeline, as_of)
            start, end = self.items.offsets[low], self.items.offsets[high]
            scores[start:end] = pair_scores(users[items.row_of()], vectors[place.reshape(-1)])
        return auc(scores, self.clicked, self.items.offsets)


@dataclass(frozen=True)
class ValidationBlock:
    """Rows of a `Validation` that share a moment."""

    validation: Validation
    rows: np.ndarray
    as_of: int | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ValidationBlock:
        """Nothing to move: blocks are made of row numbers."""
        return self


class Blocks:
    """The validation blocks as a loader with a length."""

    def __init__(self, validation: Validation) -> None:
        self._blocks = [ValidationBlock(validation, *block) for block in validation.blocks()]

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[ValidationBlock]:
        return iter(self._blocks)


def refresh_of(times: np.ndarray, refresh: int, most: int = 500) -> int:
    """Microseconds between two refreshes: as asked, doubled until at most `most` are needed."""
    while len(np.unique(times // refresh)) > most:
        refresh *= 2
    return refresh


def as_of_times_of(
    times: np.ndarray | None, refresh: int, most: int = 500, *, cutoff: int | None = None
) -> np.ndarray | None:
    """(Q,) moment at which items stood for each query: its time, rounded down to the refresh.

    Args:
        times: (Q,) microseconds, or None.
        refresh: microseconds between two refreshes, as they were asked for, see `refresh_of`.
        most: distinct moments.
        cutoff: of the model that answers; what it was made of is known to every query after it.
    """
    if times is None or len(times) == 0:
        return None
    refresh = refresh_of(times, refresh, most)
    as_of_times = times // refresh * refresh
    if cutoff is None:
        return as_of_times
    return np.where(times >= cutoff, np.maximum(as_of_times, cutoff), as_of_times)


def validation_side(
    dataset: Dataset,
    rules: TrainingRules,
    *,
    each_event: bool,
    refresh: int,
    max_history: int,
    drop_seen: bool,
    statistics: bool,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> Validation | None:
    """The validation side as queries, a seeded sample of many; None when it is empty.

    Raises:
        ConfigError: all of it was had before, and what was had is not asked for; or an AUC is to
            pick the epoch, and there are no lists for it.
    """
    chosen = np.flatnonzero(np.asarray(dataset.event_side) == Side.VALID)
    if not len(chosen):
        return None
    past = timeline_until(dataset, Side.VALID)
    # At one cut-off nothing of the validation side itself is known yet.
    known = past if each_event else timeline_until(dataset, Side.TRAIN)
    cutoff = dataset.manifest["split"]["valid_from"] if past.timed else None
    if past.timed and cutoff is None:
        # Leave-one-out has no cut-off for all; what is known ends with the last training event.
        cutoff = int(np.asarray(timeline_until(dataset, Side.TRAIN).time).max()) + 1
    context = dataset.event_context[chosen] if dataset.event_context.shape[1] else None
    questions = ask(
        known,
        np.asarray(dataset.event_user)[chosen],
        np.asarray(dataset.event_item)[chosen],
        np.asarray(dataset.event_time)[chosen],
        each_event=each_event,
        cutoff=cutoff,
        max_history=max_history,
        drop_seen=drop_seen,
        context=context,
    )
    queries, targets = questions.queries, questions.targets
    if not len(queries):
        raise ConfigError(
            f"Every positive of the validation side ({len(chosen):,} in all) repeats what its user "
            "had, so that no epoch can be chosen by it: set evaluate.drop_seen = false, or take "
            "another split.valid."
        )
    if progress is not None and 2 * questions.repeats > len(chosen):
        progress(
            f"{questions.repeats:,} of {len(chosen):,} positives of the validation side repeat "
            "what their users had and are not asked for (evaluate.drop_seen)"
        )
    if len(queries) > VALIDATION_QUERIES:
        rng = np.random.default_rng([seed, 11])
        some = np.sort(rng.choice(len(queries), VALIDATION_QUERIES, replace=False))
        queries, targets = queries.take(some), targets.take(some)
    as_of_times = as_of_times_of(queries.times, refresh) if past.timed else None
    if as_of_times is not None:
        moving = statistics or (past.exists_from[1:] > int(as_of_times.min())).any()
        if not moving:
            as_of_times = np.full(len(as_of_times), int(as_of_times.max()))
        order = np.argsort(as_of_times, kind="stable")
        queries, targets, as_of_times = queries.take(order), targets.take(order), as_of_times[order]
    seen = known.histories(queries.users, queries.times) if drop_seen else None
    shown = None
    if rules.monitor == "auc":
        shown = shown_lists(dataset, past, max_history, refresh)
    return Validation(queries, targets, seen, known, as_of_times, shown)


def shown_lists(dataset: Dataset, past: Timeline, max_history: int, refresh: int) -> ShownLists:
    """Lists shown on the validation side that hold something clicked and something not.

    Raises:
        ConfigError: there are none.
    """
    rows = np.flatnonzero(np.asarray(dataset.request_side) == Side.VALID)
    offsets = np.asarray(dataset.request_offsets)
    items = Ragged(offsets, dataset.shown_item).take(rows)
    clicked = Ragged(offsets, dataset.shown_clicked).take(rows)
    chosen = np.bincount(clicked.row_of(), clicked.values, len(clicked))
    times = np.asarray(dataset.request_time)[rows]
    mixed = np.flatnonzero((chosen > 0) & (chosen < clicked.lengths))
    mixed = mixed[np.argsort(times[mixed], kind="stable")]
    as_of_times = as_of_times_of(times[mixed], refresh)
    if as_of_times is None or not past.timed:
        raise ConfigError(
            'training.monitor = "auc" orders what was shown, and the validation side has no list '
            "with something clicked and something not. Take ndcg_at_20, or another split."
        )
    users = np.asarray(dataset.request_user)[rows][mixed].astype(np.int64)
    context = np.asarray(dataset.request_context)[rows][mixed]
    queries = asking(
        past, users, times[mixed], context if context.shape[1] else None, last=max_history
    )
    return ShownLists(queries, items.take(mixed), clicked.take(mixed).values > 0, past, as_of_times)


class InteractionData(lightning.LightningDataModule):
    """Training batches and validation blocks.

    Under DDP each rank makes its own equal part of every batch of the plan. A transformer that is
    trained at every position never asks for the vector of an empty history: there it needs
    `strategy="ddp_find_unused_parameters_true"`.

    Args:
        events: the training side, or a prepared dataset, whose training side is then taken.
        validation: queries to rank for (`validation_side`), or None.
        rules: which examples stand together, negatives, masks; None: the default rules.
        towers: what the towers read of a history; None: the default towers.
        statistics: whether the towers read item statistics.
        seed: of batches and draws.
        user_negatives: negatives of each user from a file, or None.

    Raises:
        ConfigError: the rules do not go together or ask for what this log has not, or nothing of
            it is an example.
    """

    def __init__(
        self,
        events: TrainingEvents | Dataset,
        validation: Validation | None = None,
        rules: TrainingRules | None = None,
        *,
        towers: TowerRules | None = None,
        statistics: bool = False,
        seed: int = 0,
        user_negatives: UserNegatives | None = None,
    ) -> None:
        super().__init__()
        rules = TrainingRules() if rules is None else rules
        if isinstance(events, Dataset):
            since = None if rules.since is None else duration(rules.since)
            events = training_events(events, skips=rules.skip_weight > 0, since=since)
        self.events, self.validation, self.rules = events, validation, rules
        self.towers = TowerRules() if towers is None else towers
        self.statistics, self.seed, self.user_negatives = statistics, seed, user_negatives
        self._sampler = sampler_of(rules, self.towers, statistics)
        _need_clock(rules, events)
        self.batches = self._make()
        if not len(self.batches):
            raise ConfigError(_no_example(self._sampler, self.towers.history.length))

    def _make(self, rank: int = 0, world: int = 1) -> Batches:
        rules, towers, negatives = self.rules, self.towers, self.rules.negatives
        return Batches(
            self.events,
            sampler=self._sampler,
            batch_size=fitting_batch(rules, self.events.size),
            max_history=towers.history.length,
            history_dropout=HISTORY_DROPOUT,
            elapsed=self.events.timeline.timed and "recency" in towers.history.inputs,
            event_weight="weight" in towers.history.inputs,
            example_age=towers.example_age,
            negatives="sampled" if isinstance(negatives, SampledNegatives) else "all",
            uniform_negatives=negatives.uniform,
            queue=negatives.queue,
            queue_after=QUEUE_AFTER,
            skips=rules.skip_weight > 0,
            user_negatives=self.user_negatives,
            per_query=NEGATIVES_PER_QUERY,
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


def sampler_of(rules: TrainingRules, towers: TowerRules, statistics: bool) -> SamplerName:
    """How events form batches, "auto" settled.

    Raises:
        ConfigError: the towers or other rules do not go with it.
    """
    sampler = _sampler_of(rules, towers, statistics)
    if rules.since is not None and sampler not in ("random", "in_time"):
        raise ConfigError(
            f'training.since = "{rules.since}" picks single events, but training.batches = '
            f'"{sampler}" takes whole users: leave training.since out, or set training.batches to '
            '"random" or "in_time".'
        )
    return sampler


def _sampler_of(rules: TrainingRules, towers: TowerRules, statistics: bool) -> SamplerName:
    if towers.example_age and rules.batches == "by_user":
        raise ConfigError(
            'training.batches = "by_user" asks once for everything a user chose, and nothing comes '
            "after it: set towers.example_age to 0, or take other batches."
        )
    if rules.batches == "auto":
        if statistics:
            return "in_time"
        return "sequences" if towers.history.kind == "transformer" else "random"
    if statistics and rules.batches != "in_time":
        raise ConfigError(
            f'training.batches is "{rules.batches}", but the towers read item statistics, which '
            'need batches of one time: set it to "in_time", or towers.statistics to false.'
        )
    if rules.batches == "sequences" and towers.history.kind != "transformer":
        raise ConfigError(
            'training.batches = "sequences" trains at every position, which only '
            'towers.history.kind = "transformer" can.'
        )
    return rules.batches


def _need_clock(rules: TrainingRules, events: TrainingEvents) -> None:
    """Refuse what counts time on a log that has none."""
    if events.timeline.timed:
        return
    clock = "name the column of time in [data.columns]"
    if rules.since is not None:
        raise ConfigError(
            f'training.since = "{rules.since}" is a span of time, but this log has no clock: leave '
            f"it out, or {clock}."
        )
    if rules.batches == "in_time":
        raise ConfigError(
            'training.batches = "in_time" makes windows of time, but this log has no clock: set '
            f'it to "random", or {clock}.'
        )


def _no_example(sampler: SamplerName, max_history: int) -> str:
    """Why a sampler has no batch, and what helps."""
    there_is_none = "There is no example to learn from: "
    if sampler == "sequences":
        return (
            f"{there_is_none}no user has events at two times among its newest {max_history + 1}, "
            'which training.batches = "sequences" needs. Set it to "random".'
        )
    return f"{there_is_none}the training side has no positive event. Take other values in [split]."
