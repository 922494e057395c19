"""From a prepared dataset to towers: feature tables and sizes, the model, the validation side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from recsys.errors import ConfigError
from recsys.features.batching.batches import TrainingEvents
from recsys.features.batching.examples import ask, asking, timeline_until
from recsys.features.prepared.cooccurrence import Around
from recsys.features.prepared.timeline import STATISTICS, Timeline, statistic_scale
from recsys.ragged import Ragged
from recsys.tables import Side
from recsys.towers.embedding import FeatureTable
from recsys.towers.item_context import Lookalikes, Surroundings
from recsys.towers.rules import TrainingRules
from recsys.towers.two_tower import TowerRules, TwoTower
from recsys.towers.validation import ShownLists, Validation

if TYPE_CHECKING:
    from recsys.features.prepared.dataset import Dataset
    from recsys.towers.text import TextTower

MOST_CODES = 16
"""Codes of one category that a row may carry; further ones are left out."""


def padded(codes: Ragged, most: int = MOST_CODES) -> torch.Tensor:
    """(N, C) int64 codes of each row, padded with 0; C is the longest row's, at most `most`."""
    lengths = np.minimum(codes.lengths, most)
    out = np.zeros((len(codes), max(1, int(lengths.max(initial=0)))), np.int64)
    place = np.arange(len(codes.values)) - np.repeat(codes.offsets[:-1], codes.lengths)
    keep = place < most
    out[codes.row_of()[keep], place[keep]] = codes.values[keep]
    return torch.from_numpy(out)


def _floats(array: np.ndarray | None) -> torch.Tensor | None:
    if array is None or array.shape[1] == 0:
        return None
    return torch.from_numpy(np.array(array, np.float32))


def uses_statistics(rules: TowerRules, dataset: Dataset) -> bool:
    """Whether the towers read item statistics: as configured, or when the log shows impressions.

    Raises:
        ConfigError: they are asked for, and the log has no clock.
    """
    if rules.statistics == "auto":
        return bool(dataset.manifest["timed"]) and len(dataset.request_user) > 0
    if rules.statistics and not dataset.manifest["timed"]:
        raise ConfigError(
            "towers.statistics is true, but this log has no clock, so that an item has no age. "
            "Set it to false, or name the column of time in [data.columns]."
        )
    return bool(rules.statistics)


def _need_clock(rules: TowerRules, dataset: Dataset) -> None:
    if "recency" in rules.history_inputs and not dataset.manifest["timed"]:
        raise ConfigError(
            "towers.history_inputs names recency, but this log has no clock, so that nobody knows "
            "how long ago an event was. Leave it out, or name the column of time in [data.columns]."
        )


def _need_lists(rules: TowerRules, dataset: Dataset) -> None:
    if rules.passed_over and not (len(dataset.request_user) and dataset.manifest["timed"]):
        raise ConfigError(
            "towers.passed_over reads what users were shown and passed over, and this log has no "
            "impression lists with a clock. Set it to false."
        )


def build_model(
    dataset: Dataset,
    rules: TowerRules,
    *,
    item_text: np.ndarray | None,
    user_text: np.ndarray | None = None,
    texts: Callable[[], TextTower] | None = None,
    seed: int,
    until: Side = Side.TRAIN,
) -> TwoTower:
    """Towers for a dataset, seeded.

    Args:
        dataset: prepared.
        rules: the shape.
        item_text: (N, T) text vectors of item rows, or None.
        user_text: the same for user rows.
        texts: gives an untrained text encoder over the item rows, where it is to learn with the
            towers; `item_text` is then left out.
        seed: of the initial weights.
        until: the last side that they learn from: who and what it is the first to know has id
            vectors, too.

    Raises:
        ConfigError: the towers are to read times or statistics, and the log has no clock; or what
            was passed over, and it has no impression lists; or texts, and there are none.
    """
    _need_clock(rules, dataset)
    _need_lists(rules, dataset)
    warm_items, warm_users = dataset.n_warm_items, dataset.n_warm_users
    if until != Side.TRAIN:
        warm_items, warm_users = dataset.n_refit_items, dataset.n_refit_users
    if rules.text_share and item_text is None and texts is None:
        raise ConfigError(
            "towers.text_share is a share of what items' texts say, and these items have none. "
            "Name text columns in [data.catalog], or leave text_share at 0."
        )
    items = FeatureTable(
        dataset.n_items,
        text=_floats(item_text),
        vector=_floats(dataset.item_vectors),
        numbers=_floats(dataset.item_numbers),
        categories={name: padded(codes) for name, (codes, _) in dataset.item_categories.items()},
    )
    users = FeatureTable(
        dataset.n_users,
        text=_floats(user_text),
        numbers=_floats(dataset.user_numbers),
        categories={name: padded(codes) for name, (codes, _) in dataset.user_categories.items()},
    )
    item_sizes = {name: size for name, (_, size) in dataset.item_categories.items()}
    user_sizes = {name: size for name, (_, size) in dataset.user_categories.items()}
    item_spec = items.spec(
        warm_items + 1 if rules.item_id else 0,
        item_sizes,
        len(STATISTICS) if uses_statistics(rules, dataset) else 0,
    )
    learned = None if texts is None else texts()
    if learned is not None:
        item_spec = replace(item_spec, text=learned.dimension)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoTower(
            rules,
            items,
            users,
            item_spec,
            users.spec(warm_users + 1 if rules.user_id else 0, user_sizes),
            tuple(dataset.context_sizes.values()),
            learned,
        )
        model.item_tower.inputs.surround(
            _surroundings(dataset, rules, item_spec.ids, until, seed),
            _lookalikes(rules, items.text, item_spec.ids),
        )
    return model


def _surroundings(
    dataset: Dataset, rules: TowerRules, n_ids: int, until: Side, seed: int
) -> Surroundings | None:
    if not rules.neighbours:
        return None
    around = Around.of(timeline_until(dataset, until), n_ids, rules.neighbours, seed)
    return Surroundings(around, rules.dimension, rules.neighbours_dropout)


def _lookalikes(rules: TowerRules, texts: torch.Tensor | None, n_ids: int) -> Lookalikes | None:
    if not rules.lookalikes:
        return None
    if texts is None:
        raise ConfigError(
            f"towers.lookalikes = {rules.lookalikes} finds items by texts that stay as they are, "
            "and these items have none, or they learn with the towers. Name text columns in "
            '[data.catalog] and set text.train = "frozen", or set towers.lookalikes to 0.'
        )
    return Lookalikes(texts, n_ids, rules.lookalikes)


def standardise(model: TwoTower, events: TrainingEvents, seed: int) -> None:
    """Fix the scale of item statistics from moments of the training side."""
    if not model.uses_statistics:
        return
    rng = np.random.default_rng([seed, 7])
    times = np.asarray(events.timeline.time)
    times = times if events.learned is None else times[events.learned]
    moments = rng.choice(times, size=min(64, len(times)), replace=False)
    mean, scale = statistic_scale(events.timeline, [int(m) for m in moments], 512, rng)
    model.item_tower.inputs.standardise(
        torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(scale.astype(np.float32))
    )


def refresh_of(times: np.ndarray, refresh: int, most: int = 500) -> int:
    """Microseconds between two refreshes: as asked, doubled until at most `most` are needed."""
    while len(np.unique(times // refresh)) > most:
        refresh *= 2
    return refresh


def moments_of(
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
    moments = times // refresh * refresh
    if cutoff is None:
        return moments
    return np.where(times >= cutoff, np.maximum(moments, cutoff), moments)


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
    passed: bool = False,
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
    past = timeline_until(dataset, Side.VALID, passed)
    # At one cut-off nothing of the validation side itself is known yet.
    known = past if each_event else timeline_until(dataset, Side.TRAIN, passed)
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
    if len(queries) > rules.validation_queries:
        rng = np.random.default_rng([seed, 11])
        some = np.sort(rng.choice(len(queries), rules.validation_queries, replace=False))
        queries, targets = queries.take(some), targets.take(some)
    moments = moments_of(queries.times, refresh) if past.timed else None
    if moments is not None:
        moving = statistics or (past.exists_from[1:] > int(moments.min())).any()
        if not moving:
            moments = np.full(len(moments), int(moments.max()))
        order = np.argsort(moments, kind="stable")
        queries, targets, moments = queries.take(order), targets.take(order), moments[order]
    seen = known.histories(queries.users, queries.times) if drop_seen else None
    shown = None
    if rules.monitor == "auc":
        shown = shown_lists(dataset, past, max_history, refresh)
    return Validation(queries, targets, seen, known, moments, shown)


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
    moments = moments_of(times[mixed], refresh)
    if moments is None or not past.timed:
        raise ConfigError(
            'training.monitor = "auc" orders what was shown, and the validation side has no list '
            "with something clicked and something not. Take ndcg_at_20, or another split."
        )
    users = np.asarray(dataset.request_user)[rows][mixed].astype(np.int64)
    context = np.asarray(dataset.request_context)[rows][mixed]
    queries = asking(
        past, users, times[mixed], context if context.shape[1] else None, last=max_history
    )
    return ShownLists(queries, items.take(mixed), clicked.take(mixed).values > 0, past, moments)
