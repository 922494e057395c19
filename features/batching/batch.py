"""Data classes of a training batch: queries, user inputs, candidates, masks.

Legend: Q queries, B examples, R distinct item rows of a batch, N of them candidates, M of them
encoded by the item tower, H history entries in all, K queued columns, S per-query negatives, E
masked edges. Candidates come first among the rows, then rows that are only per-query negatives (up
to M), then rows that stand only in histories.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from recsys.ragged import Ragged, slots


class Source(IntEnum):
    """Where a negative that is given to one query alone comes from."""

    SKIPPED = 0
    MINED = 1
    FILE = 2


@dataclass(frozen=True)
class Queries:
    """Who asks, with which past, and when.

    Args:
        users: (Q,) user rows, 0 for unknown.
        history: Q ragged item rows, oldest first.
        times: (Q,) int64 microseconds, or None without a clock.
        context: (Q, C) codes of the context columns, or None.
        elapsed: (H,) float64 seconds from each history entry to its query, or None.
        event_weight: (H,) float32 weight of each history entry (strength, dwell), or None.
    """

    users: np.ndarray
    history: Ragged
    times: np.ndarray | None = None
    context: np.ndarray | None = None
    elapsed: np.ndarray | None = None
    event_weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> Queries:
        """The given queries, in the given order."""

        def beside(values: np.ndarray | None) -> np.ndarray | None:
            return (
                None if values is None else Ragged(self.history.offsets, values).take(rows).values
            )

        return Queries(
            self.users[rows],
            self.history.take(rows),
            None if self.times is None else self.times[rows],
            None if self.context is None else self.context[rows],
            beside(self.elapsed),
            beside(self.event_weight),
        )


@dataclass(frozen=True)
class UserSide:
    """What the user tower reads of U users that ask Q queries.

    Args:
        users: (U,) int64 user rows.
        history: (H,) int64 positions in the item rows beside it, oldest first, one user after the
            other.
        lengths: (U,) int64 history entries of each user.
        context: (Q, C) int64 codes, C may be 0.
        at: (Q,) int64 entries of `history`, ascending, right after which each query stands: a
            causal tower answers at every position in one pass. None: each user asks once, after its
            last entry (Q = U).
        elapsed: (H,) float32 seconds from each entry to its query; with `at` to the user's next
            entry, and for the last to its query. None: not asked for, or no clock.
        event_weight: (H,) float32 weight of each entry, or None.
        age: (Q,) int64 how many events of the user came after the example, up to a bound; None
            when answering, and where it is not asked for.
    """

    users: torch.Tensor
    history: torch.Tensor
    lengths: torch.Tensor
    context: torch.Tensor
    at: torch.Tensor | None = None
    elapsed: torch.Tensor | None = None
    event_weight: torch.Tensor | None = None
    age: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UserSide:
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class Batch:
    """One training step's worth.

    Args:
        user: the user side; its history points into `rows`.
        rows: (R,) int64 distinct item rows: N candidates, then rows that are only per-query
            negatives, then the rest.
        n_candidates: N.
        n_encoded: M, candidates and per-query negatives.
        target: (B,) int64 candidate that each example chose.
        owner: (B,) int64 query of each example; None: example b is query b, and Q = B.
        queued: (K,) int64 item rows that stand as columns N … N+K-1 beside the candidates, with
            vectors remembered from earlier steps; never one of the candidates.
        log_inclusion: (N+K,) log probability that a column is among the sampled negatives.
        positive_mask: (2, E) int64 query and column that the user is known to like; may
            include the query's own targets.
        per_query: (2, S) int64 query and position in `rows`, smaller than M, of negatives
            given for this query alone.
        per_query_log_weight: (S,) float32.
        per_query_source: (S,) uint8 of `Source`.
        weight: (B,) float32 event weight of each positive.
        statistics: (R, F) item statistics as of the batch's moment, F may be 0.
        user_log_inclusion: (Q,) log of how often the user of a query is expected to stand as a
            query of the batch's other draws; None where users are not told apart.
        mean_weight: mean of `weight` over the training side; None: that of the batch.
    """

    user: UserSide
    rows: torch.Tensor
    n_candidates: int
    n_encoded: int
    target: torch.Tensor
    owner: torch.Tensor | None
    queued: torch.Tensor
    log_inclusion: torch.Tensor
    positive_mask: torch.Tensor
    per_query: torch.Tensor
    per_query_log_weight: torch.Tensor
    per_query_source: torch.Tensor
    weight: torch.Tensor
    statistics: torch.Tensor
    user_log_inclusion: torch.Tensor | None = None
    mean_weight: float | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device; Lightning calls this."""
        return _moved(self, device, non_blocking)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def n_queries(self) -> int:
        """Q."""
        return len(self.user.users) if self.user.at is None else len(self.user.at)


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            parts[name] = part.to(device, non_blocking=non_blocking)
        elif isinstance(part, UserSide):
            parts[name] = _moved(part, device, non_blocking)
    return type(value)(**parts)


def tensor(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, without a copy where it is contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array))


def context_codes(context: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """(len(rows), C) int64 codes of the given rows; C is 0 without context."""
    if context is None:
        return np.zeros((len(rows), 0), np.int64)
    return np.asarray(context[rows]).astype(np.int64)


def query_side(queries: Queries, max_history: int) -> tuple[UserSide, np.ndarray]:
    """The user side of queries, and the (R,) item rows that its histories point into."""
    history = queries.history.last(max_history)
    rows, inverse = np.unique(history.values, return_inverse=True)
    kept = slots(queries.history.offsets[1:] - history.lengths, history.lengths)
    side = UserSide(
        users=tensor(queries.users.astype(np.int64)),
        history=tensor(inverse.reshape(-1).astype(np.int64)),
        lengths=tensor(history.lengths),
        context=tensor(context_codes(queries.context, np.arange(len(queries)))),
        elapsed=None
        if queries.elapsed is None
        else tensor(queries.elapsed[kept].astype(np.float32)),
        event_weight=None
        if queries.event_weight is None
        else tensor(queries.event_weight[kept].astype(np.float32)),
    )
    return side, rows.astype(np.int64)
