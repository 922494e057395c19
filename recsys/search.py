"""Nearest-neighbour search: the `Index` protocol, and exact search.

Legend: Q queries, N rows of the index, D dimensions, k answers.
The score is always the inner product of stored vectors.
"""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from recsys.errors import QueryError
from recsys.ragged import Ragged

SCORES_AT_ONCE = 1 << 22
"""Scores that one block of exact search holds: 16 MiB of float32. From 32 MiB on, the C library
asks the system for fresh pages for every block, which costs as much as the product."""
QUERIES_AT_ONCE = 16
"""Least queries of a block however many items there are: fewer would wait for memory."""
GATHERED = 0.25
"""A filter that keeps less than this share of the rows has their vectors laid together first; for
more, leaving out of all the products is cheaper (1M × 64, one thread: .3 kept 83 → 18 ms, .9 kept
178 → 17 ms)."""
ACCELERATOR_BLOCKS = 16
"""Blocks of an accelerator are larger by this factor."""
LARGEST = 1e15
"""Largest value of a vector or query: products of larger ones may overflow float32 to infinity."""


@runtime_checkable
class Index(Protocol):
    """Rows of vectors that can be asked for those with the largest inner product."""

    @property
    def size(self) -> int: ...

    @property
    def dimension(self) -> int: ...

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best rows of each query, best first, ties by the smaller row.

        Args:
            queries: (Q, D) float32, finite.
            k: answers wanted; more than there are gives what there is.
            allowed: (N,) bool, rows that may be answered; all when absent.
            exclude: Q ragged rows, for each query the rows never to answer it with.

        Returns:
            rows (Q, k) int64 padded with -1, scores (Q, k) float32 padded with -inf.

        Raises:
            QueryError: wrong shape or dtype, not finite, or `k` below 1.
        """
        ...


def check_queries(queries: np.ndarray, dimension: int, k: int) -> None:
    """Refuse what native code would read past its end.

    Raises:
        QueryError: wrong shape or dtype, not finite or huge, or `k` below 1.
    """
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise QueryError(
            f"Queries have shape {queries.shape}, but the index holds {dimension} dimensions."
        )
    if queries.dtype != np.float32:
        raise QueryError(f"Queries are {queries.dtype}; the index takes float32.")
    _check_values(queries, "Query")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise QueryError(f"k is {k!r}; ask for a whole number.")
    if k < 1:
        raise QueryError(f"k is {k}; ask for at least 1.")


def check_filters(
    allowed: np.ndarray | None, exclude: Ragged | None, size: int, queries: int
) -> None:
    """Refuse filters that would name other rows than they mean.

    Raises:
        QueryError: `allowed` is not (size,) bool, or `exclude` has another number of rows than
            there are queries, or names a row that the index has not.
    """
    if allowed is not None and (allowed.dtype != np.bool_ or allowed.shape != (size,)):
        raise QueryError(
            f"allowed is {allowed.dtype} of shape {allowed.shape}; give one bool for each of the "
            f"{size} rows of the index."
        )
    if exclude is None:
        return
    if len(exclude) != queries:
        raise QueryError(f"exclude has {len(exclude)} rows for {queries} queries; give one each.")
    values = exclude.values
    if len(values) and not (values.min() >= 0 and values.max() < size):
        raise QueryError(
            f"exclude names rows from {values.min()} to {values.max()}, but the index has rows 0 "
            f"to {size - 1}."
        )


def check_vectors(vectors: np.ndarray) -> None:
    """Refuse vectors that would make every neighbour arbitrary.

    Raises:
        QueryError: not (N, D) float32, or not finite or huge.
    """
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise QueryError(
            f"Vectors are {vectors.dtype} of shape {vectors.shape}, not (N, D) float32."
        )
    _check_values(vectors, "Vector")


def _check_values(values: np.ndarray, what: str) -> None:
    # The two extremes need no copy, and NaN passes through them.
    if values.min(initial=0) >= -LARGEST and values.max(initial=0) <= LARGEST:
        return
    row = int(np.flatnonzero(~(np.abs(values) <= LARGEST).all(1))[0])
    if np.isfinite(values[row]).all():
        raise QueryError(f"{what} {row} of {len(values)} holds values beyond {LARGEST:g}.")
    raise QueryError(f"{what} {row} of {len(values)} holds NaN or infinity.")


def pair_scores(users: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(P,) inner products of pairs of (P, D) vectors."""
    return np.einsum("pd,pd->p", users, vectors)


class ExactIndex:
    """Every inner product, then the best; deterministic.

    Args:
        vectors: (N, D) float32, finite.
        device: where the products are made.
        checked: the vectors are known to be so; they are not read before the first question.
    """

    def __init__(
        self, vectors: np.ndarray, device: str | torch.device = "cpu", *, checked: bool = False
    ) -> None:
        if not checked:
            check_vectors(vectors)
        with warnings.catch_warnings():
            # A memory-mapped file is read-only, and nothing here writes.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            self._vectors = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)

    @property
    def size(self) -> int:
        return self._vectors.shape[0]

    @property
    def dimension(self) -> int:
        return self._vectors.shape[1]

    @property
    def vectors(self) -> np.ndarray:
        """(N, D) float32 what is searched; not to be written to."""
        return self._vectors.cpu().numpy()

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        check_queries(queries, self.dimension, k)
        check_filters(allowed, exclude, self.size, len(queries))
        queries = np.require(queries, requirements=["C", "W"])  # as torch wants them
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        kept = closed = None
        if allowed is not None:
            share = np.count_nonzero(allowed) / max(1, self.size)
            if share < GATHERED:
                kept = np.flatnonzero(allowed)
            elif share < 1:
                closed = torch.from_numpy(np.flatnonzero(~allowed))
        vectors = self._vectors if kept is None else self._vectors[torch.from_numpy(kept)]
        best = min(k, len(vectors))
        if closed is not None:
            closed = closed.to(vectors.device)
        if best == 0 or len(queries) == 0:
            return rows, scores
        place = None
        if kept is not None and exclude is not None:
            place = np.full(self.size, -1, np.int64)
            place[kept] = np.arange(len(kept))
        step = max(QUERIES_AT_ONCE, SCORES_AT_ONCE // len(vectors))
        if vectors.device.type != "cpu":
            step *= ACCELERATOR_BLOCKS
        for start in range(0, len(queries), step):
            block = slice(start, min(start + step, len(queries)))
            product = torch.from_numpy(queries[block]).to(vectors.device) @ vectors.T  # (b, n)
            if closed is not None:
                product[:, closed] = -torch.inf
            if exclude is not None:
                out = _excluded(exclude, block, place)
                product[torch.from_numpy(out[0]), torch.from_numpy(out[1])] = -torch.inf
            found, score = top_k(product, best)
            rows[block, :best], scores[block, :best] = found.cpu().numpy(), score.cpu().numpy()
        if kept is not None:
            rows[:, :best] = kept[rows[:, :best]]
        rows[np.isneginf(scores)] = -1
        return rows, scores


def _excluded(
    exclude: Ragged, block: slice, place: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    part = exclude.take(np.arange(block.start, block.stop))
    query, row = part.row_of(), part.values.astype(np.int64)
    if place is not None:
        row = place[row]
        query, row = query[row >= 0], row[row >= 0]
    return query, row


def top_k(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values of the k largest scores of each row, ties by the smaller column.

    `torch.topk` leaves ties to chance; a popularity ranking is full of them.

    Args:
        scores: (Q, N), no NaN.
        k: at most N.

    Returns:
        columns (Q, k) int64, values (Q, k).
    """
    # One more than asked for shows whether the last place is contested.
    values, columns = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]) & ~torch.isneginf(values[:, 1:])
    values, columns = values[:, :k], columns[:, :k]
    if not tied.any():
        return columns, values
    contested = tied[:, k - 1 :].any(1).nonzero()[:, 0]
    if len(contested):
        columns[contested] = _first_of_equals(
            scores[contested], values[contested], columns[contested]
        )
    rows = tied.any(1).nonzero()[:, 0]
    # Values descend already: by column, then stably by value, leaves each run of equals in order.
    by_column, order = columns[rows].sort(dim=1)
    by_value = values[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns[rows] = by_column.gather(1, by_value.indices)
    return columns, values


def _first_of_equals(
    scores: torch.Tensor, values: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The columns (Q, k) with those that hold the last value replaced by the smallest that do."""
    last, width, k = values[:, -1:], scores.shape[1], values.shape[1]
    ahead = (values > last).sum(1, keepdim=True)  # (Q, 1)
    backwards = torch.arange(width, 0, -1, device=scores.device, dtype=torch.int32)
    equals = (
        width - torch.where(scores == last, backwards, 0).topk(k, dim=1).values.long()
    )  # (Q, k)
    place = torch.arange(k, device=scores.device)[None, :] - ahead
    return torch.where(place < 0, columns, equals.gather(1, place.clamp(min=0)))
