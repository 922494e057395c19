"""Build untrained towers for a prepared dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from recsys.errors import ConfigError
from recsys.features.batching.batches import TrainingEvents
from recsys.features.batching.examples import timeline_until
from recsys.features.prepared.cooccurrence import CooccurrenceGraph
from recsys.features.prepared.timeline import STATISTICS, statistic_scale
from recsys.ragged import Ragged
from recsys.tables import Side
from recsys.towers.embedding import FeatureTable
from recsys.towers.item_context import ItemContext, TextNeighbours
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower

if TYPE_CHECKING:
    from recsys.features.prepared.dataset import Dataset
    from recsys.towers.text import TextTower

MOST_CODES = 16
"""Codes of one category that a row may carry; further ones are left out."""
NEIGHBOURS_DROPOUT = 0.1
"""Probability that all that the log says of an item is hidden in training, its id and its
neighbourhood in the co-occurrence graph; `id_dropout` then hides ids alone."""


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
    if "recency" in rules.history.inputs and not dataset.manifest["timed"]:
        raise ConfigError(
            "towers.history.inputs names recency, but this log has no clock, so that nobody knows "
            "how long ago an event was. Leave it out, or name the column of time in [data.columns]."
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
        ConfigError: the towers are to read times or statistics, and the log has no clock; or
            texts, and there are none.
    """
    _need_clock(rules, dataset)
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
        warm_items + 1 if rules.item_ids else 0,
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
            _item_context(dataset, rules, item_spec.ids, until, seed),
            _text_neighbours(rules, items.text, item_spec.ids),
        )
    return model


def _item_context(
    dataset: Dataset, rules: TowerRules, n_ids: int, until: Side, seed: int
) -> ItemContext | None:
    if not rules.cooccurrence_neighbours:
        return None
    around = CooccurrenceGraph.of(
        timeline_until(dataset, until), n_ids, rules.cooccurrence_neighbours, seed
    )
    return ItemContext(around, rules.dimension, NEIGHBOURS_DROPOUT)


def _text_neighbours(
    rules: TowerRules, texts: torch.Tensor | None, n_ids: int
) -> TextNeighbours | None:
    if not rules.text_neighbours:
        return None
    if texts is None:
        raise ConfigError(
            f"towers.text_neighbours = {rules.text_neighbours} finds items by texts that stay as "
            "they are, and these items have none, or they learn with the towers. Name text columns "
            'in [data.catalog] and set text.train = "frozen", or set towers.text_neighbours to 0.'
        )
    return TextNeighbours(texts, n_ids, rules.text_neighbours)


def standardise(model: TwoTower, events: TrainingEvents, seed: int) -> None:
    """Fix the scale of item statistics from moments of the training side."""
    if not model.uses_statistics:
        return
    rng = np.random.default_rng([seed, 7])
    times = np.asarray(events.timeline.time)
    times = times if events.learned is None else times[events.learned]
    as_of_times = rng.choice(times, size=min(64, len(times)), replace=False)
    mean, scale = statistic_scale(events.timeline, [int(m) for m in as_of_times], 512, rng)
    model.item_tower.inputs.standardise(
        torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(scale.astype(np.float32))
    )
