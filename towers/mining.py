"""Hard-negative mining from the current model's ranking.

Legend: U user rows, Q users asked for, N item rows of the index, k ranks looked at, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recsys.errors import ConfigError
from recsys.features.batching.examples import asking
from recsys.features.batching.negatives import UserNegatives
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.search import ExactIndex, Index
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.rules import MiningRules

if TYPE_CHECKING:
    from recsys.features.batching.batches import Batches
    from recsys.towers.two_tower import TwoTower

USERS_AT_ONCE = 4096
"""Users whose ranks are held at the same time: 4,096 × 500 ranks are 25 MB."""

MakeIndex = Callable[[np.ndarray], Index]
"""(N, D) vectors → something that searches them: `ExactIndex`, or an HNSW index handed down."""


FIRST_EPOCH, EVERY = 1, 2
"""First epoch, counted from 0, that has mined negatives (a model that knows nothing yet ranks
nothing high for a reason), and epochs between two minings."""


def mine(
    model: TwoTower,
    timeline: Timeline,
    rules: MiningRules,
    *,
    make_index: MakeIndex = ExactIndex,
    candidates: np.ndarray | None = None,
    epoch: int = 0,
    seed: int = 0,
) -> UserNegatives:
    """Hard negatives of each user, from its state after its last event of the timeline.

    Of the ranks between `from_rank` and `to_rank`, counted after the user's own items are left out,
    `per_query` are sampled at random.

    Args:
        model: both towers as they stand.
        timeline: the training side; nobody's items on it are ever mined for them.
        rules: which ranks, how many.
        make_index: how items are searched.
        candidates: item rows that may be negatives; None: all that exist when the timeline ends.
        epoch: draws are new in each.
        seed: of the draws.

    Returns:
        Items best first within a user; users without an event have none.

    Raises:
        ConfigError: there are no more items than are left alone.
    """
    rng = np.random.default_rng([seed, 23, epoch])
    as_of = int(np.max(timeline.time)) + 1 if timeline.timed and len(timeline.time) else None
    rows = np.flatnonzero(timeline.alive(as_of))
    if candidates is not None:
        rows = np.intersect1d(rows, candidates)
    if len(rows) <= rules.from_rank:
        raise ConfigError(
            f"training.mined.from_rank is {rules.from_rank}, but there are {len(rows)} items to "
            "choose from. Lower it, or set training.mined.per_query to 0."
        )
    items = encode_items(model, rows, timeline, as_of)  # (N, D)
    index = make_index(items)
    place = np.full(timeline.n_items, -1, np.int64)
    place[rows] = np.arange(len(rows))
    users = np.flatnonzero(np.diff(timeline.user_offsets) > 0)
    counts = np.zeros(timeline.n_users, np.int64)
    found = [np.empty(0, np.int64)]
    for start in range(0, len(users), USERS_AT_ONCE):
        block = users[start : start + USERS_AT_ONCE]
        queries = asking(timeline, block, last=model.rules.history.length, as_of=as_of)
        vectors = encode_users(model, queries, timeline, as_of)  # (Q, D)
        own = timeline.histories(block)
        own = Ragged(own.offsets, place[own.values])
        own = own.where(own.values >= 0)
        ranked, _scores = index.search(vectors, min(rules.to_rank, len(rows)), exclude=own)
        taken = ranked >= 0  # (Q, k)
        taken[:, : rules.from_rank] = False
        taken = draw(taken, rules.per_query, rng)
        counts[block] = taken.sum(1)
        found.append(rows[ranked[taken]])
    mined = np.concatenate(found)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return UserNegatives(offsets, mined, np.full(len(mined), rules.weight, np.float32))


def draw(eligible: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """(Q, k) bool: at most so many of each row's eligible places, sampled without replacement."""
    if eligible.shape[1] <= most:
        return eligible
    keys = np.where(eligible, rng.random(eligible.shape), 2.0)
    first = np.argpartition(keys, most - 1, axis=1)[:, :most]
    sampled = np.zeros_like(eligible)
    np.put_along_axis(sampled, first, True, axis=1)
    return sampled & eligible


def mine_again(
    model: TwoTower,
    batches: Batches,
    rules: MiningRules,
    epoch: int,
    *,
    make_index: MakeIndex = ExactIndex,
) -> bool:
    """Before an epoch's first batch is made: give the batches new negatives where they are due.

    Args:
        model: both towers as they stand.
        batches: whose training side is mined for, and which get the negatives.
        rules: which ranks, how many.
        epoch: counted from 0.
        make_index: how items are searched.

    Returns:
        Whether anything was mined.
    """
    if not rules.per_query or epoch < FIRST_EPOCH or (epoch - FIRST_EPOCH) % EVERY:
        return False
    events = batches.events
    batches.mined = mine(
        model, events.timeline, rules, make_index=make_index, candidates=events.candidates,
        epoch=epoch, seed=batches.seed,
    )  # fmt: skip
    return True


def to_state(mined: UserNegatives | None) -> dict[str, torch.Tensor]:
    """Mined negatives as a checkpoint keeps them, so that a run that goes on has the same."""
    if mined is None:
        return {}
    parts = {"offsets": mined.offsets, "items": mined.items, "weights": mined.weights}
    return {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}


def from_state(state: Mapping[str, Any]) -> UserNegatives | None:
    """The inverse of `to_state`."""
    if not state:
        return None
    return UserNegatives(**{name: part.numpy() for name, part in state.items()})
