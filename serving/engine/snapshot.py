"""Catalogue snapshot: what may be answered at one time, and the search over it.

Three kinds of things stand under one numbering of places: the index positions of the bundle, the
live items that came since, and item rows of the bundle that have come to be available since. The
graph holds the first; the others are few and scored one by one.

Legend: n index positions, M live items, L late rows, X = M + L, T = n + X places, Q queries,
D dimensions, k answers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from recsys.ragged import Ragged
from recsys.search import GATHERED, SCORES_AT_ONCE, top_k
from recsys.serving.engine.availability import FOREVER, MINUTE, Windows
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import INDEXED, LATE, LIVE, Key
from recsys.serving.index import HnswIndex
from recsys.serving.live.overlay import LiveView

NODE = 40
"""Rows of a narrow filter that are scored in the time in which the graph visits one node."""
SPARE = 2.0
"""Of what passes a filter by chance, so many standard deviations more are fetched."""
FIRST_TRY = 64
"""Excluded things that a first search makes room for: most of them are far from the best."""


def _open(window: np.ndarray, as_of: int | None) -> np.ndarray:
    """(R,) bool, see `recsys.serving.bundle.available`."""
    if as_of is None:
        return window[:, 0] < window[:, 1]
    return (window[:, 0] <= as_of) & (as_of < window[:, 1])


@dataclass(frozen=True)
class AllowedItems:
    """What a question may be answered with.

    Args:
        mask: (n,) bool over index positions; None: all of them.
        count: how many index positions that is.
        extra: (X,) bool.
        positions: sorted, where they are known already; may be fewer than `mask` says.
    """

    mask: np.ndarray | None
    count: int
    extra: np.ndarray
    given: np.ndarray | None = None

    @cached_property
    def positions(self) -> np.ndarray:
        """Sorted index positions that may be answered."""
        if self.given is not None:
            return self.given
        assert self.mask is not None  # or there is nothing to find
        return np.flatnonzero(self.mask)

    def index_mask(self, n: int) -> np.ndarray | None:
        """(n,) bool over index positions; None: all of them."""
        if self.given is None:
            return self.mask
        mask = np.zeros(n, bool)
        mask[self.given] = True
        return mask

    @cached_property
    def total(self) -> int:
        """Things that may be answered."""
        return self.count + int(np.count_nonzero(self.extra))


class CatalogSnapshot:
    """Everything that may be answered while neither live items nor windows change.

    Args:
        model: the bundle.
        view: what is live.
        windows: what is available when.
        moment: microseconds of now, None without a clock.

    Attributes:
        until: when to take stock anew, though nothing was changed.
        open: all that may be answered.
        extra_open: whether any live item or late row may be.
        since: (X,) int64 when each live item was put; pages begun before do not show it.
    """

    def __init__(
        self, model: LoadedModel, view: LiveView, windows: Windows, as_of: int | None
    ) -> None:
        self.model, self.view = model, view
        over, late, self.until = windows.at(as_of)
        self.over, self.late = over, late
        bundle = model.bundle
        self.index = bundle.index
        self.exact_index = model.exact
        self.n, self.live = len(bundle.rows), len(view.ids)
        if view.hidden and len(late):
            self.late = late = late[~np.isin(late, np.fromiter(view.hidden, np.int64))]
        self.size = self.n + self.live + len(late)
        self.extra = view.vectors
        if len(late):
            self.extra = np.concatenate([view.vectors, bundle.vectors[late]])
        self.closed = view.hidden_positions
        if len(over):
            self.closed = np.union1d(over, self.closed)
        self.since = np.zeros(len(self.extra), np.int64)
        self.since[: self.live] = view.since
        extra_open = np.ones(len(self.extra), bool)
        if self.live:
            extra_open[: self.live] = _open(view.window, as_of)
            changes = view.window[view.window > (as_of or 0)]
            if as_of is not None and len(changes) and (change := int(changes.min())) < FOREVER:
                self.until = min(self.until, max(change, as_of + MINUTE))
        mask = None
        if len(self.closed):
            mask = np.ones(self.n, bool)
            mask[self.closed] = False
        self.open = AllowedItems(mask, self.n - len(self.closed), extra_open)
        self.extra_open = bool(extra_open.any())

    @property
    def newest(self) -> int:
        """When the newest live item was put; 0: there is none."""
        return int(self.since.max(initial=0))

    # ------------------------------------------------------------------ places and ids

    def place_of(self, id: str) -> int:
        """Place of an id that may stand in an answer; -1: it cannot."""
        live = self.view.place.get(id)
        if live is not None:
            return self.n + live
        row = self.model.row_of(id)
        if not row or row in self.view.hidden:
            return -1
        position = int(self.model.position[row])
        if position < 0 and len(self.late):
            late = int(np.searchsorted(self.late, row))
            if late < len(self.late) and self.late[late] == row:
                return self.n + self.live + late
        return position

    def places_of(self, rows: np.ndarray, live: Sequence[int] = ()) -> np.ndarray:
        """Places of what a user had: item rows, or the live items that replaced them, and live
        items. What has no place is left out.
        """
        places = self.model.position[rows]
        if not len(self.extra):
            return places[places >= 0].astype(np.int64)
        parts = [places[places >= 0].astype(np.int64), self.n + np.array(live, np.int64)]
        if len(self.late):
            at = np.searchsorted(self.late, rows)
            there = self.late[np.minimum(at, len(self.late) - 1)] == rows
            parts.append(self.n + self.live + at[there])
        if self.live and (hidden := self.view.hidden):
            ids = self.model.bundle.items.ids
            again = [
                self.view.place.get(ids[row - 1], -1) for row in rows.tolist() if row in hidden
            ]
            parts.append(self.n + np.array([j for j in again if j >= 0], np.int64))
        return np.concatenate(parts)

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """Item rows of places; 0 of live items."""
        if not len(self.extra):
            return self.model.bundle.rows[places]
        rows = np.zeros(len(places), np.int64)
        indexed, late = places < self.n, places >= self.n + self.live
        rows[indexed] = self.model.bundle.rows[places[indexed]]
        rows[late] = self.late[places[late] - self.n - self.live]
        return rows

    def ids_of(self, places: np.ndarray) -> list[str]:
        """External ids of places."""
        rows = self.rows_of(places).tolist()
        if not self.live:
            return self.model.ids.decode(rows)
        known = iter(self.model.ids.decode(row for row in rows if row))
        live = (places - self.n).tolist()
        return [next(known) if row else self.view.ids[j] for row, j in zip(rows, live, strict=True)]

    def vectors_of(self, places: np.ndarray) -> np.ndarray:
        """(c, D) stored vectors of places."""
        known = self.exact_index.vectors
        if not len(self.extra):
            return known[places]
        out = np.empty((len(places), known.shape[1]), np.float32)
        indexed = places < self.n
        out[indexed] = known[places[indexed]]
        out[~indexed] = self.extra[places[~indexed] - self.n]
        return out

    # ------------------------------------------------------------------ the order of equals

    @cached_property
    def _names(self) -> list[str]:
        return sorted(self.view.ids)

    @cached_property
    def _live_rank(self) -> np.ndarray:
        order = sorted(range(self.live), key=self.view.ids.__getitem__)
        rank = np.empty(self.live, np.int64)
        rank[order] = np.arange(self.live)
        return rank

    def ranks(self, places: np.ndarray) -> np.ndarray:
        """(c,) numbers that order equals the same way whatever else comes and goes: index
        positions, then late rows, then live items by id.
        """
        if not len(self.extra):
            return places
        live = (places >= self.n) & (places < self.n + self.live)
        ranks = np.where(places >= self.n, places - self.live, places)
        ranks[live] = self.n + len(self.late) + self._live_rank[places[live] - self.n]
        return ranks

    def key_of(self, place: int) -> Key:
        """What a cursor remembers of a place."""
        if place < self.n:
            return INDEXED, place, ""
        if place < self.n + self.live:
            return LIVE, 0, self.view.ids[place - self.n]
        return LATE, int(self.late[place - self.n - self.live]), ""

    def rank_of(self, key: Key) -> float:
        """Where a key stands among `ranks`; between two of them when it is no longer there."""
        kind, number, id = key
        if kind == INDEXED:
            return float(number)
        if kind == LATE:
            place = int(np.searchsorted(self.late, number))
            there = place < len(self.late) and self.late[place] == number
            return self.n + place - (0.0 if there else 0.5)
        place = bisect_left(self._names, id)
        there = place < self.live and self._names[place] == id
        return self.n + len(self.late) + place - (0.0 if there else 0.5)

    # ------------------------------------------------------------------ search

    def search(
        self,
        queries: np.ndarray,
        k: int,
        allowed: AllowedItems | None = None,
        exclude: Ragged | None = None,
        *,
        exact: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Best places of each query among those of the allowed, best first, ties by the smaller.

        Narrow choices are scored one by one; else the graph is asked for more than is wanted, and
        where too few of that may be answered, everything is scored.

        Args:
            queries: (Q, D) float32.
            k: answers wanted.
            allowed: what may be answered; None: all that is open.
            exclude: Q ragged places never to answer that query with.
            exact: never ask the graph.

        Returns:
            places (Q, k) int64 padded with -1, scores (Q, k) float32 padded with -inf; whether
            nothing better can have been missed.
        """
        allowed = allowed or self.open
        if exclude is not None and not len(exclude.values):
            exclude = None
        within = exclude
        if exclude is not None and len(self.extra):
            within = exclude.where(exclude.values < self.n)
        places, scores, sure = self._indexed(queries, k, allowed, within, exact)
        if not allowed.extra.any():
            return places, scores, sure
        also, score = self._extra(queries, k, allowed, exclude)
        places = np.concatenate([places, also], axis=1)
        scores = np.concatenate([scores, score], axis=1)
        order = np.lexsort((places, -scores), axis=1)[:, :k]
        return np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1), sure

    def _extra(
        self, queries: np.ndarray, k: int, allowed: AllowedItems, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        product = queries @ self.extra.T  # (Q, X)
        product[:, ~allowed.extra] = -np.inf
        if exclude is not None:
            beyond = exclude.where(exclude.values >= self.n)
            product[beyond.row_of(), beyond.values - self.n] = -np.inf
        found, score = top_k(torch.from_numpy(product), min(k, len(self.extra)))
        scores = score.numpy()
        return np.where(np.isneginf(scores), -1, found.numpy() + self.n), scores

    def _indexed(
        self,
        queries: np.ndarray,
        k: int,
        allowed: AllowedItems,
        exclude: Ragged | None,
        exact: bool,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        if not allowed.count:
            shape = len(queries), k
            return np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32), True
        few = allowed.mask is not None and allowed.count**2 <= NODE * k * self.n
        if few or allowed.given is not None:
            return *self._narrow(queries, k, allowed.positions, exclude), True
        index = self.index
        if exact or not isinstance(index, HnswIndex):
            return *self._everything(queries, k, allowed, exclude), True
        return self._graph(index, queries, k, allowed, exclude)

    def _narrow(
        self, queries: np.ndarray, k: int, positions: np.ndarray, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every position of a few, for each query."""
        product = queries @ self.exact_index.vectors[positions].T  # (Q, c)
        if exclude is not None:
            at = np.searchsorted(positions, exclude.values)
            there = positions[np.minimum(at, len(positions) - 1)] == exclude.values
            product[exclude.row_of()[there], at[there]] = -np.inf
        found, score = top_k(torch.from_numpy(product), min(k, len(positions)))
        places = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        width = score.shape[1]
        scores[:, :width] = score.numpy()
        places[:, :width] = positions[found.numpy()]
        places[np.isneginf(scores)] = -1
        return places, scores

    def _everything(
        self, queries: np.ndarray, k: int, allowed: AllowedItems, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every position of the allowed, for each query."""
        share = allowed.count / self.n
        if share < GATHERED and len(queries) * allowed.count <= SCORES_AT_ONCE:
            return self._narrow(queries, k, allowed.positions, exclude)
        return self.exact_index.search(queries, k, allowed=allowed.mask, exclude=exclude)

    def _graph(
        self,
        index: HnswIndex,
        queries: np.ndarray,
        k: int,
        allowed: AllowedItems,
        exclude: Ragged | None,
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """The graph is asked for more than is wanted: as much as the query's own exclusions and
        filter need, whatever else is searched with it.
        """
        places = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        # Room for exclusions in powers of two, so that most queries of many share a search.
        lengths = np.zeros(len(queries), np.int64) if exclude is None else exclude.lengths
        rooms = np.where(lengths > 0, 1 << np.ceil(np.log2(np.maximum(lengths, 8))).astype(int), 0)
        for room in np.unique(rooms).tolist():
            these = np.flatnonzero(rooms == room)
            part = None if exclude is None or not room else exclude.take(these)
            places[these], scores[these] = self._graph_with_room(
                index, queries[these], k, allowed, part, room
            )
        return places, scores, False

    def _graph_with_room(
        self,
        index: HnswIndex,
        queries: np.ndarray,
        k: int,
        allowed: AllowedItems,
        exclude: Ragged | None,
        room: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        if len(queries) == 1 and allowed.mask is None:
            out = frozenset() if exclude is None else frozenset(exclude.values.tolist())
            near = index.nearest(queries[0], k, out, min(room, k + FIRST_TRY))
            if near is not None:
                return np.array([near[0]], np.int64), np.array([near[1]], np.float32)
        places = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        todo = np.arange(len(queries))

        def enough(wanted: int) -> int:
            """So many of all that `wanted` of them may be answered, if the filter is by chance."""
            if allowed.mask is None:
                return wanted
            return math.ceil((wanted + SPARE * math.sqrt(wanted)) * self.n / allowed.count)

        fetch, last = enough(k + min(room, k + FIRST_TRY)), enough(k + room)
        limit = index.rules.exact_breadth * self.n
        while len(todo) and 2 * fetch <= limit:
            found, score = index.search(queries[todo], fetch)
            left = None if exclude is None else exclude.take(todo)
            kept, best = _first(found, score, k, allowed.mask, left)
            full = kept[:, -1] >= 0
            places[todo[full]], scores[todo[full]] = kept[full], best[full]
            todo = todo[~full]
            if allowed.mask is None and fetch == last:
                break
            # What passes lies elsewhere: look further, as long as that is cheap beside all of it.
            fetch = min(4 * fetch, last) if allowed.mask is None else 4 * fetch
            limit = min(limit, allowed.count / NODE)
        if len(todo):
            rest = None if exclude is None else exclude.take(todo)
            places[todo], scores[todo] = self._everything(queries[todo], k, allowed, rest)
        return places, scores


def _first(
    found: np.ndarray,
    scores: np.ndarray,
    k: int,
    mask: np.ndarray | None,
    exclude: Ragged | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each query's found (Q, f) that may be answered, padded with -1 and -inf."""
    if mask is None and exclude is None:
        return found[:, :k], scores[:, :k]
    if len(found) == 1:
        return _first_of_one(found[0], scores[0], k, mask, exclude)
    keep = found >= 0
    if mask is not None:
        keep &= mask[found]
    if exclude is not None:
        width = int(max(found.max(initial=0), exclude.values.max(initial=0))) + 1
        line = np.arange(len(found))[:, None] * width
        keep &= ~np.isin(found + line, exclude.row_of() * width + exclude.values)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, order, 1)
    places = np.where(kept, np.take_along_axis(found, order, 1), -1)
    return places, np.where(kept, np.take_along_axis(scores, order, 1), np.float32(-np.inf))


def _first_of_one(
    found: np.ndarray,
    scores: np.ndarray,
    k: int,
    mask: np.ndarray | None,
    exclude: Ragged | None,
) -> tuple[np.ndarray, np.ndarray]:
    """See `_first`; a set is quicker than arrays for the few that one query finds."""
    if mask is not None:
        kept = np.flatnonzero(mask[found] & (found >= 0))
        found, scores = found[kept], scores[kept]
    out = set() if exclude is None else set(exclude.values.tolist())
    at = [i for i, place in enumerate(found.tolist()) if place >= 0 and place not in out][:k]
    places = np.full((1, k), -1, np.int64)
    best = np.full((1, k), -np.inf, np.float32)
    places[0, : len(at)], best[0, : len(at)] = found[at], scores[at]
    return places, best


__all__ = ["AllowedItems", "CatalogSnapshot"]
