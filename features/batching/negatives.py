"""What a query is told apart from by name: masks of what is liked, and negatives of its own.

Legend: Q queries, U user rows, E known edges, S own negatives, T entries of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recsys.features.batching.batch import Source
from recsys.features.batching.distinct import Distinct
from recsys.features.batching.slices import Asked
from recsys.features.prepared.first_seen import Firsts
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged, gather, slots
from recsys.tables import DAY

SHOWN_WITHIN = 2 * DAY
"""How far back it is counted how often an item was shown, where skips are corrected for it."""


@dataclass(frozen=True)
class UserNegatives:
    """Items that each user is told not to have chosen: mined from a model, or given in a file.

    Args:
        offsets: (U+1,) int64, the items of user row u are `items[offsets[u]:offsets[u+1]]`.
        items: (T,) item rows.
        weights: (T,) float32, how many items each stands for; 0 leaves it out.

    Raises:
        ValueError: the sizes do not fit.
    """

    offsets: np.ndarray
    items: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if len(self.items) != len(self.weights) or int(self.offsets[-1]) != len(self.items):
            raise ValueError(
                f"Negatives of users have {len(self.items)} items, {len(self.weights)} weights and "
                f"offsets that end at {self.offsets[-1]}; the three have to be equal."
            )

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.offsets) - 1

    def draw(
        self, users: np.ndarray, most: int | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At most `most` entries for each query, without repetition, each as likely as the others.

        Args:
            users: (Q,) user row of each query.
            most: None: all of them.
            rng: draws.

        Returns:
            (S,) query, (S,) item row and (S,) weight, ordered by query.
        """
        start, end = self.offsets[users], self.offsets[np.asarray(users) + 1]
        places = gather(np.arange(len(self.items)), start, end)
        query, place = places.row_of(), places.values
        if most is not None and len(place) and int(places.lengths.max()) > most:
            # In random order within each query; the first of each are taken.
            order = np.argsort(query + rng.random(len(query)))
            rank = np.arange(len(query)) - np.repeat(places.offsets[:-1], places.lengths)
            taken = np.sort(order[rank < most])
            query, place = query[taken], place[taken]
        return query, self.items[place].astype(np.int64), self.weights[place]


@dataclass(frozen=True)
class OwnNegatives:
    """Negatives of one query alone, as edges.

    Args:
        query, item: (S,) int64.
        weight: (S,) float32, above 0.
        source: (S,) uint8 of `Source`.
    """

    query: np.ndarray
    item: np.ndarray
    weight: np.ndarray
    source: np.ndarray

    @staticmethod
    def of(query: np.ndarray, item: np.ndarray, weight: np.ndarray, source: Source) -> OwnNegatives:
        """Edges of one source; row 0, which is no item, and weights of 0 are left out."""
        keep = (item > 0) & (weight > 0)
        return OwnNegatives(
            query[keep].astype(np.int64), item[keep].astype(np.int64),
            weight[keep].astype(np.float32), np.full(int(keep.sum()), source, np.uint8),
        )  # fmt: skip

    @staticmethod
    def joined(parts: list[OwnNegatives]) -> OwnNegatives:
        """All edges, part after part."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            nothing = np.empty(0, np.int64)
            return OwnNegatives.of(nothing, nothing, np.empty(0, np.float32), Source.SKIPPED)
        return OwnNegatives(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.item for part in parts]),
            np.concatenate([part.weight for part in parts]),
            np.concatenate([part.source for part in parts]),
        )

    def where(self, keep: np.ndarray) -> OwnNegatives:
        """The edges for which `keep` (S,) is true."""
        return OwnNegatives(self.query[keep], self.item[keep], self.weight[keep], self.source[keep])


class Known:
    """What a user is known to like, as one rule.

    Args:
        timeline: the training side.
        rule: "all" of it, what lies strictly in the "past" of the query, or "none".
    """

    def __init__(self, timeline: Timeline, rule: str) -> None:
        self.timeline, self.rule = timeline, rule
        self._users = Distinct(timeline.n_users)

    def edges(
        self, asked: Asked, target: np.ndarray, column: np.ndarray, n_columns: int
    ) -> np.ndarray:
        """(2, E) query and column of what each query's user is known to like.

        Args:
            asked: the queries.
            target: (B,) column of each example's item; left out where each query has one example.
            column: (n_items,) column of each item row; what is not in [0, n_columns) is none.
            n_columns: candidates and queued columns.
        """
        timeline = self.timeline
        if self.rule == "none":
            return np.empty((2, 0), np.int64)
        users = asked.query_users
        offsets = np.asarray(timeline.user_offsets)
        # Once a user, not once a query: a heavy user stands in a batch many times.
        distinct = self._users.add(users, 0)
        of_query = self._users.place[users]
        self._users.forget(distinct)
        start, end = offsets[distinct], offsets[distinct + 1]
        items = gather(timeline.item, start, end)
        found = column[items.values]
        keep = (found >= 0) & (found < n_columns)
        if self.rule == "past":
            events = slots(start, end - start)
            keep &= self._firsts.are_first[events]
            first = Ragged(items.offsets, events).where(keep).take(of_query).values
        edges = Ragged(items.offsets, found).where(keep).take(of_query)
        query, found = edges.row_of(), edges.values
        if self.rule == "past":
            before = first < asked.until[query]
            query, found = query[before], found[before]
        if asked.owner is None:
            other = found != target[query]
            query, found = query[other], found[other]
        return np.stack([query, found])

    def holds(self, asked: Asked, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(S,) bool, whether the user of each query is known to like the item."""
        if self.rule == "none" or not len(query):
            return np.zeros(len(query), bool)
        users = asked.query_users[query]
        until = asked.until[query]
        if self.rule == "all":
            until = np.asarray(self.timeline.user_offsets)[users + 1]
        return self._firsts.before(users, item, until)

    @cached_property
    def _firsts(self) -> Firsts:
        return Firsts(self.timeline)


def is_target(asked: Asked, targets: np.ndarray, own: OwnNegatives, n_items: int) -> np.ndarray:
    """(S,) bool, whether an own negative is what its very query went on to choose.

    Args:
        asked: the queries.
        targets: (B,) item row of each example.
        own: S edges.
        n_items: item rows are smaller.
    """
    if asked.owner is None:
        return targets[own.query] == own.item
    chosen = asked.owner * n_items + targets
    return np.isin(own.query * n_items + own.item, chosen)


def skips_of(
    asked: Asked,
    skips: Ragged,
    weight: np.ndarray,
    timeline: Timeline,
    *,
    strength: float = 1.0,
    correction: float = 0.0,
) -> OwnNegatives:
    """What was passed over in the requests of the examples.

    Where a score says how often an item is chosen at all, it holds how often it is shown, and in a
    list, which it has got into already, item i is chosen with odds e^s_i / shown_i: see
    `skip_correction` of `Batches`.

    Args:
        asked: the queries.
        skips: skipped item rows of each event of the training side.
        weight: of each value of `skips`.
        timeline: the training side.
        strength: multiplies every weight.
        correction: in [0, 1], how far weights are corrected for how often items are shown.
    """
    start = np.asarray(skips.offsets)[asked.events]
    end = np.asarray(skips.offsets)[asked.events + 1]
    passed = gather(skips.values, start, end)
    example = passed.row_of()
    weights = gather(weight, start, end).values * strength
    if correction:
        events = asked.events[example]
        times = np.asarray(timeline.time)[events]
        chosen, other = (
            timeline.shown_before(rows.astype(np.int64), times, SHOWN_WITHIN)
            for rows in (timeline.item[events], passed.values)
        )
        weights = weights * ((chosen + 1.0) / (other + 1.0)) ** correction
    return OwnNegatives.of(asked.query_of(example), passed.values, weights, Source.SKIPPED)


def past_of(asked: Asked, timeline: Timeline, most: int, weight: float) -> OwnNegatives:
    """What each query's user had strictly before it, each item once.

    Where nobody has the same twice, a score that does not know what its user had gives its first
    places away: what is nearest to a history is the history.

    Args:
        asked: the queries.
        timeline: the training side.
        most: newest events looked at.
        weight: how many items each stands for.
    """
    first = np.asarray(timeline.user_offsets)[asked.query_users]
    had = gather(timeline.item, np.maximum(first, asked.until - most), asked.until)
    pairs = np.unique(had.row_of() * timeline.n_items + had.values)
    query, item = np.divmod(pairs, timeline.n_items)
    return OwnNegatives.of(query, item, np.full(len(pairs), weight), Source.PAST)
