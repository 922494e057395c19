"""Item-to-item baselines: co-occurrence and text similarity.

Legend: Q queries, N item rows (row 0: nothing known), U users, k answers, D text numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from recsys.baselines import Baseline, Popularity
from recsys.ragged import Ragged
from recsys.search import ExactIndex

AT_ONCE = 1 << 22
"""Scores that one block may hold, so that memory does not grow with the number of queries."""
_LOW = (1 << 32) - 1


class CoOccurrence(Baseline):
    """Items that the same users chose: the sum over the history of item–item similarity.

    Items that share no user with the history follow by popularity, and so does everything for
    somebody without a history. The score of those lies in (-1, 0], that of others above 0.

    Args:
        similarity: (N, N) CSR, positive, sorted columns, without a diagonal.
        popularity: (N,) any number an item.
        last: how many of a history's items count.
        decay: weight of an item against the one chosen after it.
    """

    def __init__(
        self, similarity: sparse.csr_array, popularity: np.ndarray, *, last: int, decay: float
    ) -> None:
        self.similarity = similarity
        self.n_items = similarity.shape[0]
        levels, level = np.unique(np.asarray(popularity, np.float32), return_inverse=True)
        fallback = (level.reshape(-1) - len(levels) + 1) / np.float32(len(levels))
        fallback[np.isneginf(popularity)] = -np.inf
        self._fallback = Popularity(fallback)
        self._last, self._decay = last, decay

    @classmethod
    def fit(
        cls,
        event_user: np.ndarray,
        event_item: np.ndarray,
        n_items: int,
        *,
        popularity: np.ndarray | None = None,
        neighbours: int = 500,
        shrinkage: float = 10.0,
        per_user: int = 500,
        last: int = 50,
        decay: float = 0.8,
    ) -> CoOccurrence:
        """Cosine between the user sets of two items, c_ij / (sqrt(n_i n_j) + shrinkage).

        (Sarwar et al., 2001; shrinkage against chance meetings of rare items: Bell & Koren, 2007.)

        Args:
            event_user: (E,) user of each positive; the events of a user in order of time.
            event_item: (E,) item row of each positive; rows of 0 or less are left out.
            n_items: N, row 0 among them.
            popularity: (N,) what follows the items that co-occur; the number of events when absent.
            neighbours: most similar items kept for each item.
            shrinkage: in users.
            per_user: last positives of a user that count; pairs grow with their square.
            last: how many of a history's items count.
            decay: weight of an item against the one chosen after it.
        """
        known = event_item > 0
        event_user, event_item = event_user[known], event_item[known]
        if popularity is None:
            popularity = np.bincount(event_item, minlength=n_items)
        chosen = _user_items(event_user, event_item, n_items, per_user)
        users_of = sparse.csr_array(chosen.T)  # (N, U)
        count = np.diff(users_of.indptr).astype(float)
        # What an item costs at most: the items of all its users.
        cost = users_of @ np.diff(chosen.indptr).astype(float)
        found, values, kept = [], [], []
        for rows in _blocks(cost + neighbours):
            common = sparse.csr_array(users_of[rows] @ chosen)
            common.sort_indices()
            row = np.repeat(rows, np.diff(common.indptr))
            column = common.indices
            value = common.data / (np.sqrt(count[row] * count[column]) + shrinkage)
            value[row == column] = -np.inf
            best, value = _largest(common.indptr, column, value.astype(np.float32), neighbours)
            found.append(best[best >= 0].astype(np.int32))
            values.append(value[best >= 0])
            kept.append((best >= 0).sum(1))
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(kept))])
        similarity = sparse.csr_array(
            (np.concatenate(values), np.concatenate(found), offsets), (n_items, n_items)
        )
        similarity.sort_indices()
        return cls(similarity, popularity, last=last, decay=decay)

    def _search(
        self, history: Ragged, k: int, allowed: np.ndarray, exclude: Ragged
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(history), k), -1, np.int64)
        scores = np.full((len(history), k), -np.inf, np.float32)
        for block, product in self._products(history):
            out = exclude.take(block)
            value = product.data
            value[_find(product, out.row_of(), out.values)[1]] = -np.inf
            value[~allowed[product.indices]] = -np.inf
            rows[block], scores[block] = _largest(product.indptr, product.indices, value, k)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):
            found = (rows[short] >= 0).sum(1)
            out = exclude.take(short)
            query = np.concatenate([out.row_of(), np.repeat(np.arange(len(short)), found)])
            row = np.concatenate([out.values, rows[short][rows[short] >= 0]])
            more_rows, more_scores = self._fallback.best(len(short), k, allowed, query, row)
            at = np.maximum(np.arange(k) - found[:, None], 0)
            own = np.arange(k) < found[:, None]
            rows[short] = np.where(own, rows[short], np.take_along_axis(more_rows, at, 1))
            scores[short] = np.where(own, scores[short], np.take_along_axis(more_scores, at, 1))
        return rows, scores

    def score(self, history: Ragged, items: Ragged) -> np.ndarray:
        result = self._fallback.score(history, items)
        start, length = items.offsets[:-1], items.lengths
        for block, product in self._products(history):
            asked = items.take(block)
            which, at = _find(product, asked.row_of(), asked.values)
            which, at = which[product.data[at] > 0], at[product.data[at] > 0]
            shift = np.repeat(start[block] - asked.offsets[:-1], length[block])
            result[which + shift[which]] = product.data[at]
        return result

    def _products(self, history: Ragged) -> Iterator[tuple[np.ndarray, sparse.csr_array]]:
        """Blocks of queries, each with its (b, N) CSR of scores, columns sorted."""
        weights = _weights(history.last(self._last), self.n_items, self._decay)
        width = np.diff(self.similarity.indptr).astype(float)
        cost = np.minimum(abs(weights).sign() @ width, self.n_items)
        for block in _blocks(cost):
            product = sparse.csr_array(weights[block] @ self.similarity)
            product.sort_indices()
            yield block, product


class TextSimilarity(Baseline):
    """Items whose vectors are nearest to the mean of the history's, the latest weighing most.

    Args:
        vectors: (N, D) float32 of every item row, of any length; zeros where there is no text.
        popularity: (N,) what somebody gets whose history has no vector.
        last: how many of a history's items count.
        decay: weight of an item against the one chosen after it.
    """

    def __init__(
        self, vectors: np.ndarray, popularity: np.ndarray, *, last: int = 50, decay: float = 0.8
    ) -> None:
        self._unit = _unit(np.asarray(vectors, np.float32))
        self._unit[:1] = 0
        self.n_items = len(self._unit)
        self._index = ExactIndex(self._unit)
        self._fallback = Popularity(popularity)
        self._last, self._decay = last, decay

    def _search(
        self, history: Ragged, k: int, allowed: np.ndarray, exclude: Ragged
    ) -> tuple[np.ndarray, np.ndarray]:
        profile = self._profile(history)
        exclude = exclude.where(exclude.values > 0)  # the index knows no padding
        rows, scores = self._index.search(profile, k, allowed=allowed, exclude=exclude)
        empty = np.flatnonzero((profile == 0).all(axis=1))
        rows[empty], scores[empty] = self._fallback.search(
            history.take(empty), k, allowed=allowed, exclude=exclude.take(empty)
        )
        return rows, scores

    def score(self, history: Ragged, items: Ragged) -> np.ndarray:
        profile = self._profile(history)
        query, row = items.row_of(), np.maximum(items.values, 0)
        scores = self._fallback.score(history, items)
        known = (profile != 0).any(axis=1)  # (Q,)
        similar = np.flatnonzero(np.take(known, query) & (row > 0))
        step = max(1, AT_ONCE // self._unit.shape[1])
        for start in range(0, len(similar), step):
            part = similar[start : start + step]
            scores[part] = np.einsum("td,td->t", profile[query[part]], self._unit[row[part]])
        return scores

    def _profile(self, history: Ragged) -> np.ndarray:
        """(Q, D) unit vectors, zeros where the history has none."""
        weights = _weights(history.last(self._last), self.n_items, self._decay)
        return _unit(weights @ self._unit)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D) vectors of length 1; zeros stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _weights(history: Ragged, n_items: int, decay: float) -> sparse.csr_array:
    """(Q, N) float32: decay to the power of how many items came after; repeats add up."""
    lengths = history.lengths
    age = np.repeat(history.offsets[1:], lengths) - 1 - np.arange(len(history.values))
    weight = (decay ** age.astype(np.float32)).astype(np.float32)
    known = history.where(history.values > 0)
    return sparse.csr_array(
        (weight[history.values > 0], known.values, known.offsets), (len(history), n_items)
    )


def _user_items(user: np.ndarray, item: np.ndarray, n_items: int, last: int) -> sparse.csr_array:
    """(U, N) CSR of ones where a user chose an item among the last positives."""
    order = np.argsort(user, kind="stable")
    count = np.unique(user, return_counts=True)[1]
    offsets = np.concatenate([[0], np.cumsum(count)])
    chosen = Ragged(offsets, item[order]).last(last)
    ones = np.ones(len(chosen.values), np.float32)
    matrix = sparse.csr_array((ones, chosen.values, chosen.offsets), (len(count), n_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _blocks(cost: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of consecutive rows whose costs add up to about `AT_ONCE`."""
    number = (np.cumsum(cost) // AT_ONCE).astype(np.int64)
    yield from np.split(np.arange(len(cost)), np.flatnonzero(np.diff(number)) + 1)


def _find(
    matrix: sparse.csr_array, row: np.ndarray, column: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which (row, column) pairs are stored in a CSR with sorted columns, and where."""
    width = matrix.shape[1]
    stored = np.repeat(np.arange(matrix.shape[0]) * width, np.diff(matrix.indptr)) + matrix.indices
    asked = np.where(column > 0, row * width + column, -1)
    at = np.searchsorted(stored, asked)
    which = np.flatnonzero(np.append(stored, -2)[at] == asked)
    return which, at[which]


def _largest(
    indptr: np.ndarray, columns: np.ndarray, values: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the k largest of each CSR row, ties by the smaller column.

    The bits of positive floats order as the floats do, so value and column make one integer
    without equals, and a plain partition decides ties too. Rows are padded to the longest of
    about their own length (the same power of two): one long row does not make every row long.

    The values are float32, positive or -inf (absent); columns (R, k) int64 come back padded
    with -1, values (R, k) float32 with -inf.
    """
    lengths = np.diff(indptr)
    best_columns = np.full((len(lengths), k), -1, np.int64)
    best_values = np.full((len(lengths), k), -np.inf, np.float32)
    keys = values.view(np.int32).astype(np.int64) << 32 | (_LOW - columns.astype(np.int64))
    keys = np.append(np.where(values > 0, keys, -1), -1)  # the last is the padding
    magnitude = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    for size in np.unique(magnitude):
        rows = np.flatnonzero(magnitude == size)
        width = int(lengths[rows].max())
        best, place = min(k, width), np.arange(width)
        if not best:
            continue
        at = np.where(place < lengths[rows, None], indptr[rows, None] + place, -1)
        padded = keys[at]
        padded.partition(width - best, axis=1)
        top = np.sort(padded[:, width - best :], axis=1)[:, ::-1]
        there = top >= 0
        best_columns[rows, :best] = np.where(there, _LOW - (top & _LOW), -1)
        value = (top >> 32).astype(np.int32).view(np.float32)
        best_values[rows, :best] = np.where(there, value, np.float32(-np.inf))
    return best_columns, best_values
