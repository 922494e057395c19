"""Training examples and evaluation queries of a prepared dataset or a later log.

Legend: E events, Q queries, N item rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recsys.features.batching.batch import Queries
from recsys.features.batching.batches import TrainingEvents
from recsys.features.prepared.first_seen import FirstSeen
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged
from recsys.tables import Side

if TYPE_CHECKING:
    from recsys.features.prepared.dataset import Dataset


def timeline_until(dataset: Dataset, side: Side) -> Timeline:
    """Every positive and impression on the sides up to and including `side`.

    Args:
        dataset: prepared.
        side: the last side.
    """
    kept = np.asarray(dataset.event_side) <= side
    shown_item = shown_time = None
    if len(dataset.request_user):
        of_request = np.repeat(
            np.arange(len(dataset.request_user)), np.diff(dataset.request_offsets)
        )
        before = np.asarray(dataset.request_side)[of_request] <= side
        shown_item = np.asarray(dataset.shown_item)[before]
        shown_time = np.asarray(dataset.request_time)[of_request][before]
    everything = bool(kept.all())
    user_offsets = np.asarray(dataset.user_offsets)
    if not everything:
        user_offsets = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[user_offsets]
    base = Timeline.build(
        np.empty(0, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.int64),
        n_users=dataset.n_users,
        first_seen=np.asarray(dataset.item_first_seen),
        exists_from=np.asarray(dataset.item_exists_from),
        shown_item=shown_item,
        shown_time=shown_time,
        timed=dataset.manifest["timed"],
    )
    # Prepared events are sorted already; they stay memory-mapped where nothing is left out.
    return Timeline(
        user_offsets,
        dataset.event_item if everything else np.asarray(dataset.event_item)[kept],
        dataset.event_time if everything else np.asarray(dataset.event_time)[kept],
        base.first_seen,
        base.exists_from,
        base.shown,
        base.timed,
        _event_weight(np.asarray(dataset.event_weight)[kept]),
    )


def _event_weight(weight: np.ndarray) -> np.ndarray | None:
    """Weights of events where they say anything: all 1 says nothing."""
    return None if (weight == 1).all() else weight


def asking(
    past: Timeline,
    users: np.ndarray,
    times: np.ndarray | None = None,
    context: np.ndarray | None = None,
    *,
    last: int | None = None,
    as_of: int | None = None,
) -> Queries:
    """Queries of user rows with what each had before its time, how long before and its weight.

    Args:
        past: everything that may be known; each query sees only what is strictly before it.
        users: (Q,) user rows.
        times: (Q,) moments; None: everything known, asked at `moment`.
        context: (Q, C) codes, or None.
        last: newest history entries kept; None: all.
        moment: when everything known is asked about; None: the time of an entry says nothing.
    """
    history = past.histories(users, times, last)
    elapsed, weight = past.beside_histories(users, times, last, as_of)
    return Queries(users, history, times, context, elapsed, weight)


def training_events(
    dataset: Dataset,
    skips: bool,
    until: Side = Side.TRAIN,
    since: int | None = None,
) -> TrainingEvents:
    """What is learned from: events, their weights, skips and context, and what uniform negatives
    are drawn from (items known at the cut-off or learned from).

    Args:
        dataset: prepared.
        skips: whether skips are wanted.
        until: the last side to learn from: train, or valid once nothing is left to be chosen.
        since: microseconds before the newest event; what is older is history, but no example.
    """
    kept = np.flatnonzero(np.asarray(dataset.event_side) <= until)
    weight = np.asarray(dataset.event_weight)[kept]
    found = skip_weight = None
    if skips and len(dataset.skip_item):
        all_skips = Ragged(np.asarray(dataset.skip_offsets), dataset.skip_item)
        weights = Ragged(np.asarray(dataset.skip_offsets), dataset.skip_weight)
        found, skip_weight = all_skips.take(kept), weights.take(kept).values
    timeline = timeline_until(dataset, until)
    known = np.asarray(dataset.item_known).astype(bool)
    known[timeline.item] = True  # what the validation side is the first to know is learned, too
    candidates = np.flatnonzero(known)
    learned = None
    if since is not None and len(kept):
        times = np.asarray(dataset.event_time)[kept]
        learned = np.flatnonzero(times > times.max() - since)
    return TrainingEvents(
        timeline=timeline,
        weight=_event_weight(weight),
        skips=found,
        skip_weight=skip_weight,
        context=dataset.event_context[kept] if dataset.event_context.shape[1] else None,
        candidates=candidates[candidates > 0],
        learned=learned,
    )


def consecutive(past: Timeline) -> np.ndarray:
    """(2, P) item rows that a user chose one right after the other, the earlier one first."""
    same = np.asarray(past.user)[1:] == np.asarray(past.user)[:-1]
    items = np.asarray(past.item).astype(np.int64)
    pairs = np.stack([items[:-1][same], items[1:][same]])
    return pairs[:, pairs[0] != pairs[1]]


@dataclass(frozen=True)
class Questions:
    """Queries and what each user went on to choose.

    Args:
        queries: who asks, with the history before.
        targets: Q ragged item rows chosen; a target that was had before is left out when seen
            items are never answered.
        repeats: how many targets were left out for that.
        event: (Q,) first event of each query in the events given.
    """

    queries: Queries
    targets: Ragged
    repeats: int
    event: np.ndarray


def ask(
    past: Timeline,
    user: np.ndarray,
    item: np.ndarray,
    time: np.ndarray,
    *,
    each_event: bool,
    cutoff: int | None,
    max_history: int,
    drop_seen: bool,
    context: np.ndarray | None = None,
) -> Questions:
    """Turn events into queries.

    Args:
        past: everything that may be known; each query sees only what is strictly before it.
        user, item, time: (E,) the events to be foretold.
        each_event: one query for each user and time; otherwise one a user, at the cut-off.
        cutoff: moment of the queries when not `each_event`; None without a clock.
        max_history: newest history entries kept.
        drop_seen: leave out targets that the user had before the query.
        context: (E, C) codes of each event.
    """
    key = time if each_event else np.zeros_like(time)
    order = np.lexsort((key, user))
    fresh = np.ones(len(order), bool)
    fresh[1:] = (user[order][1:] != user[order][:-1]) | (key[order][1:] != key[order][:-1])
    first = order[fresh]
    offsets = np.append(np.flatnonzero(fresh), len(order)).astype(np.int64)
    targets = Ragged(offsets, item[order].astype(np.int64))
    users = user[first].astype(np.int64)
    times = time[first] if each_event else None
    if not each_event and cutoff is not None:
        times = np.full(len(first), cutoff, np.int64)
    repeats = 0
    if drop_seen:
        # Whole histories, one for each question, would grow with the square of their length.
        until = np.asarray(past.user_offsets)[users] + past.past(users, times)
        row = targets.row_of()
        had = FirstSeen(past, users).before(users[row], targets.values, until[row])
        repeats = int(had.sum())
        targets = targets.where(~had)
    said = None if context is None else context[first]
    queries = asking(past, users, times, said, last=max_history)
    asked = np.flatnonzero(targets.lengths > 0)
    return Questions(queries.take(asked), targets.take(asked), repeats, first[asked])
